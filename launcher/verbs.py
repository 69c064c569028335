"""What each verb of the `ernie` command does. Heavy imports stay inside the verb that needs them."""

from __future__ import annotations

import glob
import json
import os
import random
import signal
import time
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ernie_dist.spec.assets import find_asset
from ernie_dist.spec.errors import RunDirError, SpecError
from ernie_dist.spec.job import JobSpec, load_job
from ernie_dist.spec.lease import Vigil
from ernie_dist.spec.run_files import best_checkpoint, checkpoint_step, complete_checkpoints
from ernie_dist.spec.stop_file import StopNote, ask
from launcher.run_dir import RunDir
from launcher.submission import Submission, runs


def plan(options: Namespace) -> None:
    from launcher import calibrate
    from launcher.estimate import Cluster
    from launcher.plan import Wishes, describe, describe_rehearsal

    cluster = Cluster.parse(options.gpus) if options.gpus else None
    wishes = Wishes(options.price, options.mtbf, options.scaling)
    job = _load(options, ranks=cluster.count if cluster else options.ranks)
    named = job.resources.device
    if cluster is None and named is None and wishes != Wishes():
        raise SpecError("--price, --mtbf and --scaling are about devices: name them with --gpus, e.g. 4xA100-80G")
    if options.calibrate:
        here = _load(options, ranks=options.ranks)
        print(f"a few steps of {here.name} on {here.resources.world_size} rank(s) here", flush=True)
        found = calibrate.rehearse(here)
        calibrate.keep(here, found)
        print("\n".join([*describe_rehearsal(found), f"           kept in {calibrate.speeds_file()}", ""]))
        cluster = cluster or found.cluster
    if cluster is None and named is not None:
        cluster = Cluster.of(job.resources.world_size, named)
    known = calibrate.kept(job, cluster) if cluster else None
    if known:
        wishes = replace(wishes, speed=known[0], measured_on=known[1])
    print("\n".join(describe(job, cluster, wishes=wishes)))
    missing = [pattern for source in job.sources.values() for pattern in source.paths if not _matches(pattern)]
    if missing:
        print(f"\nnot there yet: {', '.join(missing)}")


def prepare(options: Namespace) -> None:
    from ernie_dist.data.prepare import MakePool
    from ernie_dist.data.prepare import prepare as prepare_data
    from ernie_dist.data.resolve import resolve_prepared
    from ernie_dist.data.summary import describe_data
    from launcher.plan import describe

    job = _load(options, ranks=options.ranks)
    pool: MakePool | None = None
    if options.on == "ray":
        from launcher.ray.data import RayPool

        pool = RayPool
    prepared = prepare_data(job, workers=options.workers, pool=pool)
    facts = {name: source.packed for name, source in resolve_prepared(job, prepared).sources.items()}
    print("\n".join([*describe(job, facts=facts), "", *describe_data(job, prepared)]))


def launch(options: Namespace) -> int:
    from launcher.places import PLACES, How
    from launcher.plan import describe

    if options.address:
        options.overrides.append(f"resources.ray.address={options.address}")
    job = _load(options, ranks=options.ranks)
    run_dir = RunDir(Path(options.run_dir or f"runs/{job.name}"))
    place = PLACES[options.on]()
    if options.dry_run:
        shown = place.dry_run(job, run_dir)
        print("\n".join([*describe(job), "", shown]))
        return 0
    how = How(options.workers, restart=not options.no_restart, wait=options.wait, follow=options.follow)
    return place.launch(job, run_dir, how)


def status(options: Namespace) -> None:
    from launcher.status import describe_run, watch

    run_dir = _existing(options.run_dir)
    if options.watch:
        watch(run_dir)
    else:
        print("\n".join(describe_run(run_dir)))


def logs(options: Namespace) -> None:
    from launcher.logs import print_logs

    print_logs(_existing(options.run_dir), options.rank, follow=options.follow)


def stop(options: Namespace) -> int:
    run_dir = _existing(options.run_dir)
    submission = Submission.read(run_dir.files)
    if submission is not None and submission.waits():  # whatever an earlier start of it left behind
        said = submission.described()
        submission.cancel()
        print(f"cancelled: {said}")
        return 0
    if not runs(run_dir):
        known = submission.in_queue() if submission is not None else False
        if submission is not None and known:  # it has its nodes, and has not begun
            submission.cancel()
            print(f"cancelled: {submission.described()}")
        elif submission is not None and known is None:
            raise RunDirError(f"{run_dir.root}: may be waiting in a queue: {submission.described()}; ask again there")
        else:
            print("nothing is running here")
        return 0
    ask(run_dir.files.stop, StopNote("ernie stop", notice=options.notice, now=options.now))
    print("asked to end at once" if options.now else "asked to stop after this step, with a checkpoint")
    vigil = Vigil()
    while options.wait and runs(run_dir):
        holder = run_dir.holder()
        if holder is not None and vigil.alive(holder) is False:
            raise RunDirError(f"{run_dir.root}: {holder} gives no sign of life; the next launch takes over")
        time.sleep(0.5)
    return 0


def report(options: Namespace) -> None:
    from ernie_dist.report import build_report

    print(build_report(_existing(options.run_dir).root))


def export(options: Namespace) -> None:
    run_dir = _existing(options.run_dir)
    checkpoints = complete_checkpoints(run_dir.files.checkpoints)
    best = best_checkpoint(run_dir.files.checkpoints) if options.best else None
    if options.best and best is None:
        raise RunDirError(f"{run_dir.root}: no best checkpoint is known; set evaluate.best, or choose one with --step")
    step = checkpoint_step(best) if best is not None else options.step
    chosen = [path for path in checkpoints if step in (None, checkpoint_step(path))]
    if not chosen:
        steps = ", ".join(str(checkpoint_step(path)) for path in checkpoints) or "none"
        raise RunDirError(f"{run_dir.root}: no such checkpoint; there are: {steps}")
    from ernie_dist.checkpoint import verify
    from ernie_dist.export.transformers_folder import export_model

    reason = verify(chosen[0])
    if reason:
        raise RunDirError(f"{chosen[0]}: cannot be trusted: {reason}; choose another with --step")
    job, to = run_dir.job(), Path(options.to).resolve()
    print(export_model(job, chosen[0], to, adapter_only=options.adapter_only))


def chat(options: Namespace) -> None:
    from ernie_dist.serve.console import chat as talk

    sampling = _sampling(options, seed=random.randrange(1 << 32) if options.seed is None else options.seed)
    talk(_model(options.model, options), sampling, options.system)


def serve(options: Namespace) -> None:
    from ernie_dist.serve.access import check_host, read_auth

    auth = read_auth(options.auth)
    check_host(options.host, auth)
    from ernie_dist.serve.server import Defaults, listen
    from ernie_dist.serve.server import serve as run

    defaults = Defaults(_sampling(options), options.system)
    listening = listen(options.host, options.port)  # a model may take minutes to load
    models = [_model(options.model, options)]
    if options.against:
        options.adapter = None
        models.insert(0, _model(options.against, options))
    run(models, defaults, listening, feedback=None if options.api_only else Path(options.feedback), auth=auth)


def _sampling(options: Namespace, **more: Any) -> Any:
    from ernie_dist.inference import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    return Sampling(**{name: getattr(options, name) for name in names}, **more)


def _model(folder: str, options: Namespace) -> Any:
    if Path(folder).exists():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a bar for a second of reading is noise
    from ernie_dist.loading import load

    for number in (signal.SIGTERM, signal.SIGHUP):  # nothing here goes on later, as a run does
        signal.signal(number, signal.SIG_DFL)
    return load(folder, adapter=options.adapter, device=options.device, dtype=options.dtype)


def eval(options: Namespace) -> None:
    from ernie_dist.evaluate.command import Wanted, evaluate

    evaluate(Wanted(**{field.name: getattr(options, field.name) for field in fields(Wanted)}))


def schema(options: Namespace) -> None:
    print(json.dumps(JobSpec.model_json_schema(), indent=1))


def drill(options: Namespace) -> int:
    from launcher import drill as drills

    return drills.run(
        find_asset("recipes", options.job, ".yaml"),
        Path(options.dir),
        overrides=options.overrides,
        ranks=options.ranks,
        rounds=options.rounds,
        faults=options.faults.split(",") if options.faults else None,
        seed=options.seed,
        steps=options.steps,
    )


def quickstart(options: Namespace) -> int:
    from launcher.quickstart import run

    return run(Path(options.dir))


def _load(options: Namespace, *, ranks: int | None) -> JobSpec:
    from launcher.fit import settled

    job, chosen = settled(load_job(find_asset("recipes", options.job, ".yaml"), options.overrides, ranks=ranks))
    if chosen:
        print(chosen)
    return job


def _existing(path: str) -> RunDir:
    run_dir = RunDir(Path(path))
    if not run_dir.exists() and Submission.read(run_dir.files) is None:
        raise RunDirError(f"{path}: is not a run directory (no job.json); `ernie launch` makes one")
    return run_dir


def _matches(pattern: str) -> bool:
    return bool(glob.glob(pattern, recursive=True))
