"""A model that answers: one prompt streamed, or many in batches.

messages --chat template--> prompt ids --generate, KV cache--> Answer, or pieces of text as they come
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from ernie_dist.data.documents import Turn
from ernie_dist.data.render import LAST_ANSWER, ChatFrame, control_tokens, is_control
from ernie_dist.data.tokenizer import chat_frame
from ernie_dist.spec.errors import DataError, EnvironmentProblem, SpecError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": ...}"""
Stream = Generator[str, None, "Answer"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 512
    """at most; an answer ends where the context does"""
    temperature: float = 0.0
    """0: the likeliest token, always"""
    top_p: float = 1.0
    """the smallest set of tokens with at least this share of the probability; 1: all"""
    top_k: int = 0
    """the k likeliest tokens; 0: all"""
    repetition_penalty: float = 1.0
    """what is there already becomes less likely by this factor (Keskar et al. 2019, arXiv:1909.05858)"""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises SpecError."""
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 10, "between 0 and 10"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "above 0 and at most 10"),
            ("seed", 0 <= self.seed < 1 << 63, "between 0 and 2^63 - 1"),
        ):
            if not fits:
                raise SpecError(f"{name} is {getattr(self, name)}, expected {wanted}")

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        # transformers takes no 1 for 1.0, nor a slider's 5.0 for 5
        chance = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": int(self.top_k)}
        return {
            "max_new_tokens": int(self.max_new_tokens),
            "do_sample": self.temperature > 0,
            "repetition_penalty": float(self.repetition_penalty),
            **(chance if self.temperature > 0 else {}),
        }


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    """generated, the stop token not counted"""
    stopped: bool
    """by a stop token; False: cut off at max_new_tokens"""


class PromptTooLong(DataError):
    """Prompt and answer do not fit the model's context."""


class ChatModel:
    """A causal language model with its tokenizer, in evaluation mode. Threads that ask it wait for one another."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self._stops = _stop_ids(model, tokenizer)
        self._frame: ChatFrame | None = None
        with suppress(DataError):  # a template that cannot be trained on can be asked with
            self._frame = chat_frame(tokenizer)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Beams, penalties and what else a model's own config asks for do not count.
        model.generation_config = GenerationConfig(eos_token_id=self._stops, pad_token_id=self._pad)
        added = tokenizer.added_tokens_decoder
        self._control = control_tokens(added.values())
        controls = {number for number, token in added.items() if is_control(token.content, token.special)}
        self._unsaid = controls | set(self._stops)
        self._turn = threading.Lock()

    @property
    def context(self) -> int:
        """Positions that prompt and answer may take together."""
        return int(self.model.config.max_position_embeddings)

    def prompt(self, messages: Sequence[Message], max_new_tokens: int = 1) -> list[int]:
        """Token ids up to where the answer begins, with at least `max_new_tokens` positions left for it.

        Raises DataError for roles in the wrong order, for a control token written out in a message, which the template
        would take for its own; PromptTooLong where prompt and answer do not fit the context.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.name}: its tokenizer has no chat template, so it cannot be asked; use an instruction model, "
                "or put a chat_template.jinja in its folder"
            )
        _check_turns(messages)
        self._check_contents(messages)
        ids = [token for text in self._segments(messages) for token in self._tokens(text)]
        if len(ids) + max_new_tokens > self.context:
            raise PromptTooLong(
                f"the prompt has {len(ids):,} tokens, and with {max_new_tokens:,} for the answer that is more than the "
                f"{self.context:,} positions of {self.name}; shorten the conversation"
            )
        return ids

    def _segments(self, messages: Sequence[Message]) -> list[str]:
        """As training cuts a conversation before it is tokenised, so that earlier answers have the tokens they had."""
        whole = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        if self._frame is None:
            return [whole]
        said = [Turn(message["role"], message["content"], False) for message in messages]
        segments = self._frame.segments((*said, Turn("assistant", "", True)))
        texts = [text for text, _ in segments[: [value for _, value in segments].index(LAST_ANSWER)]]
        return texts if "".join(texts) == whole else [whole]  # some templates leave out what an earlier answer thought

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = Sampling(),
        *,
        batch_size: int = 32,
        progress: Callable[[int], object] = lambda done: None,
    ) -> list[Answer]:
        """One answer for each prompt (token ids, any length). The same seed and batch size give the same answers.

        Prompts of one batch are padded on the left. `progress` is told how many more are done.
        """
        found: list[Answer] = []
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor([[self._pad] * (width - len(prompt)) + list(prompt) for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            out = self._generate(ids, mask, sampling, seed=sampling.seed + first)
            # Padding has no positions: each has the room that it has alone.
            rows = zip(batch, out[:, width:].tolist(), strict=True)
            found += [self._answer(row[: max(self.context - len(prompt), 0)]) for prompt, row in rows]
            progress(len(batch))
        return found

    def stream(self, messages: Sequence[Message], sampling: Sampling = Sampling()) -> Stream:
        """The answer in pieces of text, as it comes; joined, what `answers` gives, and that is what it returns at its
        end. A piece is empty where a token has nothing to show. Leaving it ends the generation. Raises what `prompt`
        raises, before the first piece.
        """
        return self._stream(torch.tensor([self.prompt(messages)]), sampling)

    def _stream(self, ids: torch.Tensor, sampling: Sampling) -> Stream:
        tokens = _Tokens()
        left = threading.Event()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                mask = torch.ones_like(ids)
                self._generate(ids, mask, sampling, seed=sampling.seed, streamer=tokens, left=left)
            except BaseException as error:  # raised by the reader
                failed.append(error)
                tokens.end()

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        said = ""
        so_far: list[int] = []
        try:
            for token in tokens:
                so_far.append(token)
                text = self._text(so_far)
                new = text[len(said) :] if text.startswith(said) else ""
                said += new
                yield new
        finally:
            left.set()
            thread.join()
        if failed:
            raise failed[0]
        return self._answer(so_far)

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        sampling: Sampling,
        *,
        seed: int,
        streamer: BaseStreamer | None = None,
        left: threading.Event | None = None,
    ) -> torch.Tensor:
        room = self.context - int(mask.sum(1).min())
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        try:
            with self._turn, torch.no_grad():
                torch.manual_seed(seed)
                return self.model.generate(
                    input_ids=ids.to(self.model.device),
                    attention_mask=mask.to(self.model.device),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Left(left)] if left else []),
                    use_cache=True,
                    **sampling.arguments(),
                )
        except torch.OutOfMemoryError:
            raise EnvironmentProblem(
                f"{self.name}: the memory of {self.model.device} is too small for {len(ids)} at once, with prompts of "
                f"up to {ids.shape[1]:,} tokens; shorten the conversation, ask fewer at once, or take bf16"
            ) from None

    def _answer(self, ids: list[int]) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self._stops), None)
        kept = ids[:end]
        return Answer(self._text(kept), len(kept), end is not None)

    def _text(self, ids: Sequence[int]) -> str:
        """What was said, without control tokens and without the half of a character that an answer may end in."""
        said = [token for token in ids if token not in self._unsaid]
        return self.tokenizer.decode(said, clean_up_tokenization_spaces=False).strip().rstrip("\ufffd")

    def _check_contents(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, 1):
            if self._control and (found := self._control.search(message["content"])):
                raise DataError(
                    f"turn {number} ({message['role']}) holds the control token {found[0]} as text, which would steer "
                    "the model; remove it, or write it with a space inside"
                )


def generate(
    model: ChatModel, question: str | Sequence[Message] | Sequence[str], *, batch_size: int = 32, **sampling: Any
) -> Any:
    """The answer to a question or a conversation (text); to a list of questions (a list of texts).

    `sampling` are the fields of Sampling, e.g. temperature=0.7, max_new_tokens=100.
    """
    how = Sampling(**sampling)
    many = not isinstance(question, str) and all(isinstance(one, str) for one in question)
    asked = question if many else [question]
    conversations = [[{"role": "user", "content": one}] if isinstance(one, str) else list(one) for one in asked]
    prompts = [model.prompt(one) for one in conversations]
    texts = [answer.text for answer in model.answers(prompts, how, batch_size=batch_size)]
    return texts if many else texts[0]


def next_piece(stream: Stream) -> str | Answer:
    """The next piece of an answer that is streamed; after the last one, the answer."""
    try:
        return next(stream)
    except StopIteration as end:
        return end.value


class _Tokens(BaseStreamer):
    """Hands tokens from the thread that generates to the one that reads."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompted = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompted:
            self._queue.put(int(value))
        self._prompted = True  # what comes first is the prompt

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[int]:
        return iter(self._queue.get, None)  # type: ignore[arg-type]


class _Left(StoppingCriteria):
    """Ends a generation that nobody reads any more."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._left.is_set(), device=input_ids.device)


def _check_turns(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("content"), str):
            raise DataError(f"turn {number} ({message.get('role')}) has no text; give it as content")
    roles = [message.get("role", "") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    if turns != wanted or len(turns) % 2 == 0:
        raise DataError(
            f"the turns are by {', '.join(roles) or 'nobody'}; expected user and assistant in turn, a user last, "
            "and at most one system prompt, first"
        )


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends an answer: the tokenizer's stop token and those of the model's generation config."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ids)
