"""The `ernie` command. Each verb imports what it needs when it is called, so `ernie --help` is instant."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

_VERBS = {
    "plan": "stages, steps, micro-batches, memory, time and cost, before a GPU is touched",
    "prepare": "tokenise every source once; launch does it too when needed",
    "launch": "start a job, or go on where the same run directory stopped",
    "status": "what a run is doing",
    "logs": "a run's output",
    "stop": "stop a run at its next step, with a checkpoint",
    "report": "write report.html and loss_curve.png",
    "export": "write a transformers directory from a run's checkpoint",
    "eval": "ask a model, measure its answers, and hold them against another model's",
    "chat": "talk to a model in the terminal",
    "serve": "a page to talk to a model in the browser, and an OpenAI-compatible API",
    "schema": "print the JSON schema of a job, for editors",
    "drill": "prove that a job survives: a short version of it, undisturbed and under faults",
    "quickstart": "train a tiny model on generated data, interrupt it, go on, and show the result",
}
_EXAMPLES = """examples:
  ernie plan three-stage-0.3b --gpus 4xA100-80G
  ernie launch job.yaml --run-dir runs/law --set curriculum.0.duration="2M tokens"
  ernie launch job.yaml --on slurm --dry-run         # the script that would be submitted
  ernie status runs/law --watch
  ernie eval runs/law                                # the test split, before and after training
  ernie chat runs/law
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 wrong job or data, 75 stopped and resumable, 1 crashed."""
    options = _parser().parse_args(arguments)
    # Schedulers and lost terminals mean a Ctrl-C; train.sbatch itself sees to a USR1 that comes before the launch does.
    early = () if "ERNIE_BATCH_JOB" in os.environ else (signal.SIGUSR1,)
    for number in (signal.SIGTERM, signal.SIGHUP, *early):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    from ernie_dist.spec.errors import ErnieError
    from launcher import verbs

    try:
        return int(getattr(verbs, options.verb)(options) or 0)
    except ErnieError as error:
        print(f"ernie: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nernie: interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 75
    except BrokenPipeError:  # `ernie logs | head`
        sys.stderr.close()
        return 1 if options.verb in ("launch", "drill") else 0
    except OSError as error:
        print(f"ernie: {error.filename or 'this machine'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ernie",
        description="Train ERNIE models through a curriculum, on a laptop or a cluster.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    at = {
        name: verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for name, text in _VERBS.items()
    }
    for name in ("plan", "prepare", "launch", "drill"):
        at[name].add_argument("job", metavar="JOB", help="a YAML file, or the bare name of a packaged recipe")
        at[name].add_argument(
            "--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE",
            help='change a field: --set curriculum.0.duration="2M tokens"; may be repeated',
        )  # fmt: skip
        at[name].add_argument("--ranks", type=_positive, metavar="N", help="ranks on this one machine")
    _add_plan_options(at["plan"])
    at["prepare"].add_argument(
        "--on", choices=["local", "ray"], default="local", help="this machine, or the CPUs of the Ray cluster it is in"
    )
    at["prepare"].add_argument("--workers", type=_positive, metavar="N", help="processes (default: all cores)")
    launch = at["launch"]
    launch.add_argument(
        "--on", choices=["local", "slurm", "ray"], default="local", help="where to run (default: this machine)"
    )
    launch.add_argument("--address", metavar="URL", help="of a Ray cluster to submit to: http://head:8265")
    launch.add_argument("--run-dir", metavar="DIR", help="default: runs/NAME")
    launch.add_argument(
        "--workers", type=_positive, metavar="N", help="processes that prepare data (default: all cores)"
    )
    launch.add_argument("--no-restart", action="store_true", help="do not start a crashed run again (restarts.max 0)")
    launch.add_argument("--wait", action="store_true", help="if another launch runs there, wait for its end")
    launch.add_argument("--dry-run", action="store_true", help="show the plan and the script, start nothing")
    launch.add_argument("--follow", action="store_true", help="print the log of what was submitted until it ends")
    for name in ("status", "logs", "stop", "report", "export"):
        at[name].add_argument("run_dir", metavar="RUN_DIR")
    at["status"].add_argument("--watch", action="store_true", help="again every two seconds, until the run is over")
    at["logs"].add_argument("-f", "--follow", action="store_true", help="go on printing what is added")
    at["logs"].add_argument("--rank", type=int, default=0, metavar="R", help="whose log (default: 0)")
    at["stop"].add_argument("--now", action="store_true", help="end it at once, without a checkpoint of this step")
    at["stop"].add_argument(
        "--notice", type=_seconds, metavar="TIME", help="the machine is gone after this time, e.g. 30s"
    )
    at["stop"].add_argument("--wait", action="store_true", help="return when the run has stopped")
    _add_model_options(at["chat"])
    at["chat"].add_argument(
        "--seed", type=int, metavar="N", help="makes chance repeatable (default: another each time)"
    )
    _add_serve_options(at["serve"])
    at["export"].add_argument("--to", required=True, metavar="DIR", help="folder to write")
    at["export"].add_argument("--adapter-only", action="store_true", help="the LoRA adapter alone, for peft")
    which = at["export"].add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss")
    _add_evaluation(at["eval"])
    drill = at["drill"]
    drill.add_argument("--rounds", type=_positive, default=20, metavar="N", help="faults, one after another (20)")
    drill.add_argument(
        "--faults", metavar="A,B", help="which kinds (default: all): kill, kill-in-save, power-off, term, freeze, "
        "disk, truncate, flip, ranks",
    )  # fmt: skip
    drill.add_argument("--seed", type=int, default=0, help="of the order and the moments of the faults (0)")
    drill.add_argument("--steps", type=_positive, default=60, metavar="N", help="length of the short version (60)")
    drill.add_argument("--dir", default="drill", metavar="DIR", help="folder to work in (drill)")
    at["quickstart"].add_argument("--dir", default="quickstart", metavar="DIR", help="folder to work in")
    return parser


def _add_plan_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--gpus", metavar="NxDEVICE", help="plan for these devices, e.g. 4xA100-80G, or 2xCPU: this one")
    verb.add_argument(
        "--calibrate", action="store_true", help="make a few steps here first, and plan with the speed they have"
    )
    verb.add_argument("--price", type=_price, metavar="P", help="of one GPU for an hour, for the cost")
    verb.add_argument(
        "--mtbf", type=_seconds, metavar="TIME", help="mean time between failures of one node: how often to save"
    )
    verb.add_argument("--scaling", action="store_true", help="time, efficiency and cost on 1 to 1,024 devices")


def _add_model_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="a model folder, an adapter's, a run directory, or a hub id")
    verb.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to put on the model")
    verb.add_argument("--system", default="", metavar="TEXT", help="the system prompt to begin with")
    verb.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token, always (default)")
    verb.add_argument("--top-p", type=float, default=1.0, help="the likeliest tokens with this share together (1: all)")
    verb.add_argument("--top-k", type=int, default=0, help="the k likeliest tokens (0: all)")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: says less of it again (1)")
    verb.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="length of an answer at most (512)")
    verb.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    verb.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="default: bf16 on a GPU, else fp32")


def _add_serve_options(verb: argparse.ArgumentParser) -> None:
    _add_model_options(verb)
    verb.add_argument("--against", metavar="BASE", help="a second model, whose answers are shown beside")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    verb.add_argument("--port", type=int, default=7860, metavar="N", help="7860; 0: any that is free")
    verb.add_argument("--auth", metavar="FILE", help="holds USER:PASSWORD; or set ERNIE_AUTH to it")
    verb.add_argument(
        "--feedback", default="feedback.jsonl", metavar="FILE", help="where thumbs up go, as training data"
    )
    verb.add_argument("--api-only", action="store_true", help="no page, only /v1/chat/completions and /v1/models")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL_OR_RUN", help="a model folder, a LoRA adapter, a run directory or a hub id")
    add("--against", metavar="BASE", help="model to compare with (default: a run's model before training); none")
    add("--adapter", metavar="DIR", help="LoRA adapter to put on MODEL; MODEL without it is the base")
    add("--data", metavar="FILE", help="rows to ask (default: what the run held out of its conversations)")
    add(
        "--split",
        choices=["train", "validation", "test"],
        help="of the run's data (test), or of FILE as the run splits",
    )
    add("--source", metavar="NAME", help="source of the run: the one to ask, or how to read FILE")
    add("--prompt", metavar="FIELD", help="field or template of the question (default: by the names in the first row)")
    add("--response", metavar="FIELD", help="field or template of the reference")
    add("--system", metavar="FIELD", help="field or template of the system prompt")
    add("--conversation", choices=["messages", "alpaca", "sharegpt", "erniekit"], help="layout of conversation rows")
    add("--encoding", default="utf-8", help="of FILE, and of references (utf-8)")
    add("--label", metavar="FIELD", help="classify: choose among the labels that occur in this field")
    add("--references", metavar="FILE", help="references, one in each line, where the rows of FILE hold none")
    add("--metrics", metavar="A,B", help="only these (default: all that the rows allow); exec runs code against tests")
    add("--limit", type=_positive, metavar="N", help="ask N rows, drawn with the seed")
    add("--batch-size", type=_positive, default=16, metavar="N", help="prompts answered at once (16)")
    add("--max-new-tokens", type=_positive, default=256, metavar="N", help="length at which an answer is cut off (256)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token, always (0)")
    add("--top-p", type=float, default=1.0, help="smallest set of tokens with this share of the probability (1)")
    add("--top-k", type=int, default=0, help="the k likeliest tokens; 0: all (0)")
    add("--repetition-penalty", type=float, default=1.0, help="1: none (1)")
    add("--seed", type=int, default=0, help="of sampling, of --limit and of the bootstrap (0)")
    add("--samples", type=_positive, default=1, metavar="N", help="answers to each question, for pass@k (1)")
    add("--k", default="1", metavar="A,B", help="the k of pass@k (1)")
    add("--exec-timeout", type=_seconds, default=10.0, metavar="TIME", help="for the tests of one answer (10s)")
    add("--exec-unconfined", action="store_true", help="run code although this machine cannot confine it")
    add("--ranks", type=_positive, default=1, metavar="N", help="processes, a GPU each (1)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="of both models (default: bf16 on a GPU, else fp32)")
    add("--tasks", metavar="A,B", help="benchmarks of lm-evaluation-harness")
    add("--json", metavar="OUT", help="where the results go as well")
    add("--to", metavar="DIR", help="folder to write (one of its own in RUN/evaluation or evaluation)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    from ernie_dist.spec.resources import parse_time

    try:
        return parse_time(text).total_seconds()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a price; give a number, e.g. 2.5")
    return price
