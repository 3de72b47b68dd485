"""The commands that are attacked: arguments, shares of the trials, and when a reader takes their result for whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm2clip.store.store import INDEX, SIDECAR_MANIFESTS
from llm2clip.trainers.run_context import RESULT_FILES

# Below it is all that a command writes, in a folder that is there before.
WORK = "work"
OUT = f"{WORK}/out"


@dataclass(frozen=True)
class Attacked:
    """A command that is attacked. It runs in a folder of its own, and writes `OUT` there.

    Attributes:
        arguments: Its arguments, in which `{inputs}` is the folder of the inputs and `{repo}` a repo of the Hub.
        kills, faults: Trials of the profile `ci`.
        is_whole: Whether a reader takes what is in `OUT` for a whole result.
        result: Patterns of what this result consists of.
        again: Appended when it is run again.
        sockets: Whether it writes to the Hub rather than to a folder.
        needs: Commands whose result it reads.
        repeats: Whether the finished command, run again, uses what is there.
        damaged: Whether files of its result are damaged; not where all of them are of other commands.
    """

    arguments: str
    kills: int
    faults: int
    is_whole: Callable[[Path], bool]
    result: tuple[str, ...] = ("*",)
    again: str = ""
    sockets: bool = False
    needs: tuple[str, ...] = ()
    repeats: bool = True
    damaged: bool = True


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda folder: any((folder / name).is_file() for name in names)


def _all_embedded(folder: Path) -> bool:
    return len(list(folder.glob(SIDECAR_MANIFESTS))) == 2


def _exists(folder: Path) -> bool:
    return folder.is_dir()


def _stage(name: str, kills: int, faults: int, *needs: str) -> Attacked:
    return Attacked(
        f"{name} {{inputs}}/{name}.yaml",
        kills,
        faults,
        is_whole=_has(*RESULT_FILES),
        result=RESULT_FILES,
        again="--resume",
        needs=needs,
        repeats=False,
    )


ATTACKED: dict[str, Attacked] = {
    "stage1": _stage("stage1", 5, 10),
    "mntp": _stage("mntp", 3, 6),
    "embed": Attacked("embed {inputs}/embed.yaml", 5, 10, _has(INDEX), needs=("stage1",)),
    "sidecars": Attacked("embed {inputs}/sidecars.yaml", 4, 10, _all_embedded, needs=("stage1",)),
    "stage2": _stage("stage2", 6, 12, "embed"),
    "index": Attacked(
        f"index {{inputs}}/pictures --model {{inputs}}/model --output-dir {OUT} --batch-size 4 --shard-size 8 "
        "--num-workers 0",
        5,
        10,
        _has("manifest.json"),
    ),
    "convert": Attacked(
        f"convert {{inputs}}/original.pt {OUT} --model-config {{inputs}}/model_config.json "
        "--text-model {inputs}/golden_llm",
        4,
        8,
        _exists,
        repeats=False,
    ),
    "build": Attacked(f"build {{inputs}}/model {OUT}", 4, 5, _exists, repeats=False),
    "evaluate": Attacked(
        f"evaluate {{inputs}}/model --benchmark {{inputs}}/strange.py --data {{inputs}}/benchmarks --output {OUT} "
        "--num-workers 0",
        4,
        8,
        lambda folder: any(folder.glob("*.json")),
    ),
    "export-onnx": Attacked(
        f"export-onnx {{inputs}}/model --parts vision --output-dir {OUT}", 2, 3, _exists, repeats=False
    ),
    "push": Attacked(
        "push {inputs}/made/build/work/out {repo} --check false",
        3,
        3,
        _exists,
        sockets=True,
        needs=("build",),
        damaged=False,
    ),
    "quickstart": Attacked(
        f"quickstart --profile {{inputs}}/quickstart.yaml --output_dir {OUT} --llm {{inputs}}/llm "
        "--vision_model {inputs}/vision --embedding-model {inputs}/bert --data {inputs}/captioned "
        "--image_column picture",
        2,
        2,
        _has("results.json"),
        result=("results.json",),
        damaged=False,
    ),
}
