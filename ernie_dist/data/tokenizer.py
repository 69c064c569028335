"""The job's tokenizer, opened or trained, published as a complete folder that everyone after us loads.

hub id | folder | {train: ...}  -->  DATA_DIR/tokenizer/FINGERPRINT/{tokenizer.json, tokenizer_config.json, ...}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_dist.data.render import ChatFrame
from ernie_dist.spec.errors import DataError

FORMAT = 1
ERNIE_TEMPLATE = """\
{{- "<|begin_of_sentence|>" -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + "<|end_of_sentence|>" -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- else -%}
        {{- raise_exception("roles are system, user and assistant, not " + message["role"]) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""
_TOKENIZER_FILE = re.compile(r"token.*\.json$|\.model$|^(vocab|merges|chat_template)\.(json|txt|jinja)$")
_ERNIE_MARKS = ("<|begin_of_sentence|>", "<|end_of_sentence|>")
_ROLES = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
}


@dataclass(frozen=True)
class PublishedTokenizer:
    """A tokenizer folder, and what a worker needs to know of it."""

    folder: Path
    fingerprint: str
    vocab_size: int
    """highest id + 1"""
    stop_id: int
    """ends a document; generation stops on it"""
    frame: ChatFrame | None
    """None: no chat template"""
    label_replacements: dict[int, int]
    """{end of turn: stop_id}: the one stays in the inputs, the other is what the model learns to say there"""

    def require_chat(self, source: str) -> None:
        """Raises DataError if conversations cannot be rendered."""
        if self.frame is None:
            raise DataError(
                f"sources.{source} holds conversations, and the tokenizer has neither a chat template nor "
                f"{' and '.join(_ERNIE_MARKS)}; use an instruction model's tokenizer, or put a chat_template.jinja in "
                "its folder"
            )


def find_tokenizer(given: str) -> tuple[str, list[Path]]:
    """(what AutoTokenizer loads, files to hash): a folder with its files, or a hub id with none.

    Raises DataError for a path that is not there.
    """
    path = Path(os.path.expanduser(os.path.expandvars(given)))
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _TOKENIZER_FILE.search(file.name))
        if not files:
            raise DataError(f"tokenizer: {given}: the folder holds no tokenizer.json, tokenizer.model or the like")
        return str(path), files
    if path.exists() or given.startswith((".", "/", "~", "$")) or given.count("/") > 1:
        raise DataError(
            f"tokenizer: {given}: no such folder; give a folder with tokenizer files, a hub id, or {{train: ...}}"
        )
    return given, []


def publish_pretrained(name: str, root: Path) -> PublishedTokenizer:
    """Loads a hub id or folder and publishes it under `root`. Raises DataError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # not given, transformers may ask
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"tokenizer: {name}: cannot be loaded: {reason}; give a folder, a hub id you can reach, or {{train: ...}}"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer: {name}: there is no fast version of it; convert it to a tokenizer.json first")
    return publish(tokenizer, root)


def train_and_publish(texts: Iterator[str], vocab_size: int, root: Path) -> PublishedTokenizer:
    """Trains a byte-level BPE tokenizer on `texts` and publishes it. The same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(_ROLES.values())),  # <unk> 0, <s> 1, </s> 2, as ERNIE has them
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, clean_up_tokenization_spaces=False, **_ROLES)
    return publish(tokenizer, root)


def load_published(root: Path, fingerprint: str) -> PublishedTokenizer | None:
    """What was published under `root`, or None if it is not (completely) there."""
    try:
        facts = json.loads((root / f"{fingerprint}.json").read_bytes())
    except OSError:
        return None
    folder = root / fingerprint
    if facts.pop("format") != FORMAT or not (folder / "tokenizer.json").exists():
        return None
    frame = ChatFrame.from_json(facts.pop("frame")) if facts["frame"] else facts.pop("frame")
    replacements = {int(key): value for key, value in facts.pop("label_replacements").items()}
    return PublishedTokenizer(folder=folder, frame=frame, label_replacements=replacements, **facts)


def give_template(tokenizer: Any) -> Any:
    """A tokenizer of ERNIE's without a chat template is given ERNIE's; any other is left as it is."""
    if not tokenizer.chat_template and all(mark in _special(tokenizer) for mark in _ERNIE_MARKS):
        tokenizer.chat_template = ERNIE_TEMPLATE
    return tokenizer


def _special(tokenizer: Any) -> dict[str, int]:
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def publish(tokenizer: Any, root: Path) -> PublishedTokenizer:
    """A tokenizer that transformers has loaded, and what a worker needs to know of it. Raises DataError."""
    frame = chat_frame(give_template(tokenizer))
    if tokenizer.eos_token_id is None:
        raise DataError(
            "tokenizer: it names no eos_token, so no document would have an end; add one to its tokenizer_config.json"
        )
    stop_id = tokenizer.eos_token_id
    end_of_turn = _special(tokenizer)[frame.closing.strip()] if frame else stop_id

    aside = root / f".publishing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer.save_pretrained(aside)
    fingerprint = _fingerprint(tokenizer, aside)
    facts = {
        "fingerprint": fingerprint,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "stop_id": stop_id,
        "frame": frame.to_json() if frame else None,
        "label_replacements": {str(end_of_turn): stop_id} if end_of_turn != stop_id else {},
    }
    folder = root / fingerprint
    if (folder / "tokenizer.json").exists():
        shutil.rmtree(aside)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    write_json(root / f"{fingerprint}.json", {"format": FORMAT, **facts})
    published = load_published(root, fingerprint)
    assert published is not None
    return published


def chat_frame(tokenizer: Any) -> ChatFrame | None:
    """What its chat template writes around contents; None without one. Raises DataError if it cannot be trained on."""
    if not tokenizer.chat_template:
        return None
    return ChatFrame.derive(_template_of(tokenizer), _special(tokenizer).__contains__)


def _template_of(tokenizer: Any) -> Callable[[list[dict[str, str]], bool], str]:
    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"the tokenizer's chat template fails on the turns {roles}: {error}") from None

    return render


def _fingerprint(tokenizer: Any, folder: Path) -> str:
    """16 hex digits over what decides token ids and rendering, however the files are laid out."""
    backend = json.loads((folder / "tokenizer.json").read_bytes())
    what = {
        "backend": {key: value for key, value in backend.items() if key not in ("version", "truncation", "padding")},
        "template": tokenizer.chat_template,
        "special": {role: str(getattr(tokenizer, role)) for role in _ROLES},
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes aside and renames, so that no reader sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
