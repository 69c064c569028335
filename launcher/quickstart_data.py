"""A small made-up world in Chinese: everyday stories, a herbal, and questions about the herbs. Nothing is real."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path

_PEOPLE = ("小明", "王老师", "邻居家的孩子", "老船长", "奶奶", "送信的人", "木匠", "学徒")
_PLACES = ("集市上", "河边", "山脚下", "学校门口", "桥头", "旧码头", "院子里", "图书馆里")
_TIMES = ("清早", "午后", "傍晚", "下雪的那天", "月圆之夜", "春分那天", "雨停以后", "放学以后")
_DEEDS = ("修好了一只旧钟", "喂饱了流浪的猫", "种下一排小树", "写完了一封长信", "听见远处的笛声",
          "买回半筐苹果", "找到丢失的钥匙", "学会了一首新歌")  # fmt: skip
_ENDS = ("大家都很高兴。", "谁也没有说话。", "风慢慢停了。", "灯一盏一盏亮起来。", "他笑着走回家。", "第二天又是晴天。")

_FIRST, _SECOND = "青白赤金银紫玄云霜露", "芷蕊藤参苓芝"
_ORIGINS = ("雁门", "云梦", "沧州", "巴东", "陇西", "琼崖", "漠北", "江陵")
_TASTES = ("甘", "苦", "辛", "酸", "咸", "淡")
_ILLS = ("头痛", "咳嗽", "失眠", "腹胀", "目赤", "牙痛", "体虚", "风寒")
_COLOURS = ("红色", "黄色", "蓝色", "白色", "紫色")


def write_data(folder: Path, seed: int = 7) -> None:
    """stories.jsonl, herbs.csv (gb18030), qa.jsonl, and pairs.jsonl: each answer beside that of the next herb."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    herbs = list(_herbs(chance))
    _write_jsonl(folder / "stories.jsonl", ({"text": text} for text in _stories(chance, 15000)))
    with (folder / "herbs.csv").open("w", encoding="gb18030", newline="") as file:
        rows = csv.DictWriter(file, fieldnames=list(herbs[0]))
        rows.writeheader()
        rows.writerows(herbs)
    questions = list(_questions(herbs))
    _write_jsonl(folder / "qa.jsonl", iter(questions))
    _write_jsonl(folder / "pairs.jsonl", _preferences(questions))


def _stories(chance: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        parts = [
            f"{chance.choice(_TIMES)}，{chance.choice(_PEOPLE)}在{chance.choice(_PLACES)}{chance.choice(_DEEDS)}，"
            for _ in range(chance.randint(1, 3))
        ]
        yield "".join(parts) + chance.choice(_ENDS)


def _herbs(chance: random.Random) -> Iterator[dict[str, str]]:
    for first in _FIRST:
        for second in _SECOND:
            yield {
                "名称": first + second,
                "产地": chance.choice(_ORIGINS),
                "味道": chance.choice(_TASTES),
                "病症": chance.choice(_ILLS),
                "颜色": chance.choice(_COLOURS),
            }


def _questions(herbs: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    for herb in herbs:
        name = herb["名称"]
        yield {"question": f"{name}产于哪里？", "answer": f"{name}产于{herb['产地']}。"}
        yield {"question": f"{name}可治什么？", "answer": f"{name}可治{herb['病症']}。"}


def _preferences(questions: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    for right, wrong in zip(questions, [*questions[2:], *questions[:2]], strict=True):
        yield {"prompt": right["question"], "chosen": right["answer"], "rejected": wrong["answer"]}


def _write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
