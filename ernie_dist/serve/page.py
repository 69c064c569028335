"""The page in the browser: one chat, or two models side by side on the same questions. The only importer of gradio."""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ernie_dist.inference import ChatModel, Sampling
from ernie_dist.serve.conversation import Conversation
from ernie_dist.serve.feedback import record
from ernie_dist.spec.errors import EnvironmentProblem, ErnieError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
try:
    import gradio as gr
except ImportError as missing:
    raise EnvironmentProblem(
        f"{missing.name} is not installed; pip install 'ernie_dist[serve]', or serve with --api-only"
    ) from None

_FONT = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


def add_page(app: FastAPI, models: Sequence[ChatModel], sampling: Sampling, system: str, feedback: Path) -> None:
    """Mounts the page at /. Sliders begin at `sampling`; thumbs go to `feedback` and its neighbours."""
    names = _names(models)
    with gr.Blocks(title="ernie", analytics_enabled=False, fill_height=True) as page:
        state = gr.State([Conversation() for _ in models])
        with gr.Row(scale=1):
            chats = [
                gr.Chatbot(label=name, height="60vh", buttons=["copy"], latex_delimiters=[], elem_id=f"side-{number}")
                for number, name in enumerate(names)
            ]
        with gr.Row():
            question = gr.Textbox(
                placeholder="问点什么 / ask something", show_label=False, scale=8, autofocus=True, elem_id="question"
            )
            send = gr.Button("Send 发送", variant="primary", elem_id="send")
            stop = gr.Button("Stop 停止", elem_id="stop")
            clear = gr.Button("New chat 新对话", elem_id="clear")
        with gr.Accordion("Settings 设置", open=True):
            prompt = gr.Textbox(value=system, label="System prompt 系统提示", elem_id="system", lines=1)
            with gr.Row():
                settings = _sliders(sampling, min(model.context for model in models))
        answer = _answerer(models)
        asking = [
            event(answer, [question, state, prompt, *settings], [question, state, *chats], show_progress="hidden")
            for event in (question.submit, send.click)
        ]
        stop.click(None, cancels=asking, queue=False)
        for begin_anew in (clear.click, *(chat.clear for chat in chats)):
            begin_anew(
                lambda: ([Conversation() for _ in models], *([] for _ in models)), None, [state, *chats], cancels=asking
            )
        for number, chat in enumerate(chats):
            chat.like(_thumb(feedback, number), [state], None)
    page.queue(default_concurrency_limit=1)
    theme = gr.themes.Default(font=_FONT, font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(app, page, path="/", footer_links=[], run_history=False, ssr_mode=False, theme=theme)


def _names(models: Sequence[ChatModel]) -> list[str]:
    if len(models) == 1:
        return [models[0].name]
    return [f"{role}: {model.name}" for role, model in zip(("base", "tuned"), models, strict=True)]


def _sliders(sampling: Sampling, context: int) -> list[Any]:
    """In the order of `_SETTINGS`."""
    longest = max(min(context, 4096), 1)
    return [
        gr.Slider(0, max(2.0, sampling.temperature), sampling.temperature, step=0.05, label="temperature"),
        gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="top_p"),
        gr.Slider(0, max(200, sampling.top_k), sampling.top_k, step=1, label="top_k (0: all)"),
        gr.Slider(
            0.5,
            max(2.0, sampling.repetition_penalty),
            sampling.repetition_penalty,
            step=0.05,
            label="repetition_penalty",
        ),
        gr.Slider(1, longest, min(sampling.max_new_tokens, longest), step=1, label="max_new_tokens"),
    ]


_SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


def _answerer(models: Sequence[ChatModel]) -> Callable[..., Iterator[Any]]:
    def answer(question: str, sides: list[Conversation], system: str, *settings: float) -> Iterator[Any]:
        """Each model in turn, piece by piece."""
        if not question.strip():
            yield question, sides, *_shown(sides)
            return
        sampling = Sampling(**dict(zip(_SETTINGS, settings, strict=True)), seed=secrets.randbelow(1 << 32))
        for side in sides:
            side.system = system.strip()
            side.ask(question)
        yield "", sides, *_shown(sides)
        for model, side in zip(models, sides, strict=True):
            try:
                messages, left_out = side.fitting(model, sampling.max_new_tokens)
                if left_out:
                    gr.Info(f"the context is full: the oldest {left_out} questions and their answers are left out")
                for _ in side.hear(messages, model.stream(messages, sampling)):
                    yield "", sides, *_shown(sides)
                if side.unanswered:
                    gr.Info(html.escape(f"{model.name} said nothing; ask in other words, or at another temperature"))
            except ErnieError as error:
                gr.Warning(html.escape(str(error)))
            side.settle()
            yield "", sides, *_shown(sides)

    return answer


def _shown(sides: Sequence[Conversation]) -> list[list[dict[str, str]]]:
    return [[dict(turn) for turn in side.turns] for side in sides]


def _thumb(feedback: Path, number: int) -> Callable[..., None]:
    def thumb(sides: list[Conversation], data: gr.LikeData) -> None:
        if not isinstance(data.liked, bool):  # taken back
            return
        try:
            written = record(feedback, sides, number, data.index, liked=data.liked)
        except ErnieError as error:
            gr.Warning(html.escape(str(error)))
        else:
            gr.Info(html.escape(f"kept in {', '.join(map(str, written))}"))

    return thumb
