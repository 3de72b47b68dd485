"""Install the wheel with each extra alone and run its commands: `python -m tests.compatibility.extras [EXTRA ...]`."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import datasets
import yaml

from tests.builders import tiny
from tests.pictures import noise

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "extras"
ENCODE = """
import sys
from PIL import Image
from llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (LLM2CLIPModel, LLM2CLIPProcessor))
rows = model.eval().encode_text(["a red dog", "two birds"], processor)
images = model.encode_image([Image.new("RGB", (30, 24), "red")], processor)
assert rows.shape[0] == 2 and images.shape == (1, rows.shape[1])
"""
OTHERS = """
import eccv_caption, evaluate, mteb, open_clip, sentence_transformers
"""


class Environment:
    """The wheel with an extra in a new virtual environment, and a folder to run its commands in."""

    def __init__(self, wheel: Path, extra: str, model: Path, images: Path) -> None:
        self.model, self.images, self.folder = str(model), str(images), BUILD / (extra or "base")
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
        self.bin = self.folder / "venv" / "bin"
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
        subprocess.run(pip, check=True)
        # Nothing of the checkout, and nothing from a network.
        self.variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.variables |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "home")}

    def run(self, *command: str) -> str:
        """Run a program of the environment and return what it printed.

        Raises:
            CalledProcessError: It ended with an error, which stderr shows.
        """
        words = [str(self.bin / command[0]), *command[1:]]
        done = subprocess.run(
            words, cwd=self.folder, env=self.variables, check=True, stdout=subprocess.PIPE, text=True
        )
        return done.stdout

    def answers(self, command: list[str], port: int, path: str) -> bytes:
        """Start a server of the environment, ask it once, and end it by Ctrl-C.

        Raises:
            RuntimeError: It ended before it answered, or did not end when it was told to.
        """
        words = [str(self.bin / command[0]), *command[1:], "--port", str(port)]
        process = subprocess.Popen(words, cwd=self.folder, env=self.variables)
        try:
            for _ in range(120):
                if process.poll() is not None:
                    break
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                        return bytes(answer.read())
                except OSError:
                    time.sleep(1)
            raise RuntimeError(f"{' '.join(command)} did not answer; it ended with {process.poll()}.")
        finally:
            process.send_signal(2)
            process.wait(30)


def base(environment: Environment) -> None:
    environment.run("python", "-c", ENCODE, environment.model)


def train(environment: Environment) -> None:
    cache = str(environment.folder / "cache")
    source = {"path": f"{environment.images}/train.parquet", "caption_columns": ["caption"]}
    recipe = environment.folder / "recipe.yaml"
    fields = {"text_model_name_or_path": environment.model, "sources": [source], "output_dir": cache}
    recipe.write_text(yaml.safe_dump(fields))
    environment.run("llm2clip", "embed", str(recipe))
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    output = str(environment.folder / "stage2")
    fields = {"model_name_or_path": environment.model, "sources": [source], "output_dir": output, **steps}
    recipe.write_text(yaml.safe_dump({**fields, "embedding_cache": cache}))
    environment.run("llm2clip", "stage2", str(recipe))
    environment.run("python", "-c", ENCODE, output)


def search(environment: Environment) -> None:
    index = str(environment.folder / "index")
    environment.run(
        "llm2clip", "index", f"{environment.images}/files", "--model", environment.model, "--output-dir", index
    )
    assert "3.png" in environment.run("llm2clip", "search", index, "a red dog", "--top", "12")
    assert b"ok" in environment.answers(
        ["llm2clip", "serve", environment.model, "--index", index], free_port(), "/health"
    )


def evaluation(environment: Environment) -> None:
    environment.run("python", "-c", OTHERS)
    data = f"{environment.images}/train.parquet"
    assert "T2I" in environment.run("llm2clip", "evaluate", environment.model, "--benchmark", data)


def demo(environment: Environment) -> None:
    images = f"{environment.images}/files"
    command = ["llm2clip", "demo", "--model", environment.model, "--data", images]
    assert b"gradio" in environment.answers(command, free_port(), "/")


CHECKS: dict[str, Callable[[Environment], None]] = {
    "": base, "train": train, "search": search, "eval": evaluation, "demo": demo,
}  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def write_images(folder: Path) -> None:
    """Write twelve pictures as files, and as a table with captions."""
    (folder / "files").mkdir(parents=True)
    pictures = [noise(24 + number, 30) for number in range(12)]
    for number, picture in enumerate(pictures):
        picture.save(folder / "files" / f"{number}.png")
    captions = [f"a picture of number {number}" for number in range(12)]
    table = datasets.Dataset.from_dict({"image": pictures, "caption": captions})
    table.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet")


def main(extras: list[str]) -> int:
    shutil.rmtree(BUILD / "given", ignore_errors=True)
    tiny.save(BUILD / "given" / "model")
    write_images(BUILD / "given" / "images")
    options = ["--wheel", "--no-isolation", "--outdir", str(BUILD / "given")]
    subprocess.run([sys.executable, "-m", "build", *options, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = (BUILD / "given").glob("*.whl")
    failed = []
    for extra in extras or CHECKS:
        begin = time.monotonic()
        try:
            environment = Environment(wheel, extra, BUILD / "given" / "model", BUILD / "given" / "images")
            CHECKS[extra](environment)
        except (AssertionError, RuntimeError, subprocess.SubprocessError) as error:
            failed.append(extra)
            print(f"{extra or 'base':8}failed: {error}", file=sys.stderr)
        else:
            print(f"{extra or 'base':8}works   {time.monotonic() - begin:.0f} s", flush=True)
            shutil.rmtree(environment.folder)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
