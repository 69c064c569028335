"""What the model sees, and in which order: sources, mixtures over them, and the stages of a curriculum."""

from __future__ import annotations

import math
import os
import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ernie_dist.spec.quantity import Count, Duration
from ernie_dist.spec.strict import Strict
from ernie_dist.spec.training import ScheduleSpec

Kind = Literal["text", "chat", "preference"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class SplitSpec(Strict):
    """Shares of a source's documents, decided by a hash of each document's content. They add up to 1."""

    train: float = Field(0.99, gt=0, le=1, description="share of documents trained on")
    validation: float = Field(0.01, ge=0, lt=1, description="share held out for the loss curve")
    test: float = Field(0.0, ge=0, lt=1, description="share held out for the final evaluation")

    @model_validator(mode="after")
    def _adds_up(self) -> SplitSpec:
        total = self.train + self.validation + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"shares add up to {total:g}, not 1; change one of train, validation, test")
        return self


class TriplesSpec(Strict):
    """How rows of entity, attribute, value become documents."""

    make: Literal["text", "qa"] = Field(description="sentences, or questions and answers")
    phrasings: int = Field(1, ge=1, le=6, description="documents of each triple, as far as there are wordings")
    filter: bool = Field(False, description="leave out triples that say nothing, and count them by reason")
    longest: int | None = Field(None, ge=1, description="characters of an entity, attribute or value; else left out")
    tidy: bool = Field(False, description="take out [[link]] marks, [1] footnotes, and line breaks")
    hold_out: Literal["documents", "entities", "phrasings"] = Field(
        "documents", description="what the split deals out: documents, whole entities, or wordings of each triple"
    )

    @model_validator(mode="after")
    def _wordings_to_hold_out(self) -> TriplesSpec:
        if self.hold_out == "phrasings" and self.phrasings == 1:
            raise ValueError("hold_out: phrasings holds back some wordings of each triple: set phrasings to 2 or more")
        return self


class SourceSpec(Strict):
    """A named dataset, and how one of its rows becomes a document.

    A document is plain text (`text`, or `triples: text`), a conversation (`prompt` and `response`, `conversation`, or
    `triples: qa`), or a question with a better and a worse answer (`preference`).
    """

    path: str | tuple[str, ...] | None = Field(None, description="file, glob or list of them: data/web/*.jsonl.zst")
    dataset: str | None = Field(None, description="a `datasets` hub id, or a folder written by save_to_disk")
    subset: str | None = Field(None, description="configuration name of a hub dataset")
    dataset_split: str = Field("train", description="split of a hub or saved dataset")
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "txt", "md", "parquet"] = Field(
        "auto", description="auto goes by the file's ending"
    )
    encoding: str = Field("utf-8", description="text encoding, e.g. gb18030")
    text: str | None = Field(None, description='a field name, or a template such as "{ask}\\n{answer}"')
    prompt: str | None = Field(None, description="field or template of the question")
    response: str | None = Field(None, description="field or template of the answer")
    system: str | None = Field(None, description="field or template of the system prompt")
    conversation: Literal["messages", "alpaca", "sharegpt", "erniekit"] | None = Field(
        None, description="layout of conversation rows"
    )
    preference: Literal["pairs", "erniekit"] | None = Field(
        None, description="layout of rows with a chosen and a rejected answer, for a stage with dpo"
    )
    triples: Literal["text", "qa"] | TriplesSpec | None = Field(
        None, description="rows are entity, attribute, value: make sentences or question-answer pairs of them"
    )
    on_bad_row: Literal["fail", "quarantine"] = Field("fail", description="stop, or set bad rows aside and count them")
    overlong: Literal["fail", "truncate", "drop"] = Field(
        "fail", description="conversations longer than a sequence (text is split instead)"
    )
    dedupe: bool = Field(False, description="drop documents whose content was seen before")
    repeat: bool = Field(False, description="allow a stage to go through this source more than once")
    split: SplitSpec | None = Field(None, description="overrides the job's split")

    @field_validator("path")
    @classmethod
    def _paths(cls, value: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        return (value,) if isinstance(value, str) else value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError("unknown encoding; e.g. utf-8, gb18030, big5, utf-16") from None
        return value

    @field_validator("text", "prompt", "response", "system")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                list(string.Formatter().parse(value))
            except ValueError as error:
                raise ValueError(f"not a valid template ({error}); write {{{{ for a literal brace") from None
        return value

    @model_validator(mode="after")
    def _one_of_each(self) -> SourceSpec:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (files) or dataset (hub id or saved dataset)")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response belong together: give both")
        layouts = ("text", "prompt", "conversation", "preference", "triples")
        given = [name for name in layouts if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise ValueError(
                "say how a row becomes a document by one of text, prompt + response, conversation, preference, "
                f"triples; got {said}"
            )
        if self.system is not None and self.prompt is None:
            raise ValueError("system goes with prompt and response; other layouts carry it in their rows")
        if self.preference is not None and self.overlong == "truncate":
            raise ValueError("half a pair of answers says nothing; set overlong to drop, or fail")
        return self

    @property
    def kind(self) -> Kind:
        """Whether documents are plain text, conversations or pairs of answers."""
        if self.preference is not None:
            return "preference"
        triples = self.triples.make if isinstance(self.triples, TriplesSpec) else self.triples
        return "text" if self.text is not None or triples == "text" else "chat"

    @property
    def paths(self) -> tuple[str, ...]:
        """The path patterns with environment variables and ~ expanded."""
        patterns = (self.path,) if isinstance(self.path, str) else self.path or ()
        return tuple(os.path.expanduser(os.path.expandvars(pattern)) for pattern in patterns)


MixtureSpec = Annotated[
    dict[str, Annotated[float, Field(gt=0, le=1)]],
    Field(min_length=1, description="source: share of the stage's tokens; the shares add up to 1"),
]


class DpoSpec(Strict):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: float = Field(0.1, gt=0, description="how firmly the model is held to the one it was when the stage began")
    sft_weight: float = Field(0.0, ge=0, description="how much the loss of the chosen answers counts beside it")


class StageSpec(Strict):
    """A span of the run with one mixture, one sequence length and one objective."""

    name: Name
    duration: Duration = Field(description="'30B tokens', '500 steps' or '2 epochs'")
    sequence_length: int = Field(ge=8, le=1 << 20, description="token positions per sequence")
    mixture: MixtureSpec
    schedule: ScheduleSpec | None = Field(None, description="a learning-rate schedule of the stage's own")
    tokens_per_batch: Count | None = Field(None, description="overrides the job's")
    micro_batch_size: int | None = Field(None, ge=1, description="overrides the engine's; sequences per rank and pass")
    freeze: tuple[str, ...] = Field((), description="parameters not updated, as name patterns: model.embed_tokens.*")
    loss: Literal["answers", "last_answer", "all"] = Field(
        "answers", description="positions of a conversation that count; in plain text all do"
    )
    dpo: DpoSpec | None = Field(None, description="learn from pairs of answers; {} for the usual beta")
    neftune_alpha: float = Field(
        0.0, ge=0, description="noise on the embeddings in training (NEFTune, arXiv:2310.05914); 0: none, usual is 5"
    )

    @field_validator("mixture")
    @classmethod
    def _sums_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        total = math.fsum(value.values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            fixed = ", ".join(f"{name}: {weight / total:.4g}" for name, weight in value.items())
            raise ValueError(f"weights add up to {total:g}, not 1; in the same proportions: {{{fixed}}}")
        return value
