"""The `llm2clip` command: one subcommand per job."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.utils.logs import LogFile, command_logs, quiet_libraries
from llm2clip.utils.progress import close_bars, is_main_process
from llm2clip.utils.settings import add_fields, build_config, complete_flags, given_fields, nearest

logger = logging.getLogger(__name__)

# What a user can mend; anything else is a fault of ours and keeps its traceback. A KeyError of a class of its own is
# a message (a caption that the cache lacks), a plain one is a fault.
USER_ERRORS = (ValueError, OSError, ImportError, KeyError)


@dataclass(frozen=True)
class Command:
    """A job.

    Attributes:
        help: What it does, in one line.
        module: Module with its settings class and its `run`; imported only when the job is asked for, since the
            libraries behind it take seconds to import.
        config: Name of the settings class.
        positional: What the arguments before the options are: a RECIPE, or the fields of these names. A field that
            holds a list takes any number of them, also none.
        optional: Those of them that may be left out.
        resumes: Whether it has a `--resume` option.
        writes_log: Whether its messages are kept in `log.txt` in its `output_dir`.
        extra: Extra of this package that installs what it needs.
    """

    help: str
    module: str
    config: str
    positional: tuple[str, ...] = ("recipe",)
    optional: tuple[str, ...] = ()
    resumes: bool = False
    writes_log: bool = False
    extra: str = "train"


COMMANDS = {
    "quickstart": Command(
        "the whole story on the bundled data: both stages, evaluation, a Hub-ready folder",
        "llm2clip.quickstart.pipeline",
        "QuickstartConfig",
        positional=(),
        writes_log=True,
        extra="quickstart",
    ),
    "mntp": Command(
        "optional, before stage 1: masked next token prediction",
        "llm2clip.trainers.run_mntp",
        "MNTPConfig",
        resumes=True,
        writes_log=True,
    ),
    "stage1": Command(
        "caption contrastive fine-tuning of the LLM",
        "llm2clip.trainers.run_stage1",
        "Stage1Config",
        resumes=True,
        writes_log=True,
    ),
    "embed": Command(
        "the captions' embedding cache; goes on where it stopped",
        "llm2clip.embedding.embed",
        "EmbedConfig",
        writes_log=True,
    ),
    "stage2": Command(
        "vision tower and adapter against the cache",
        "llm2clip.trainers.run_stage2",
        "Stage2Config",
        resumes=True,
        writes_log=True,
    ),
    "evaluate": Command(
        "image-text retrieval or caption retrieval of a saved model",
        "llm2clip.evaluation.evaluate",
        "EvaluateConfig",
        positional=("model",),
    ),
    "convert": Command(
        "a checkpoint of the original code, of Microsoft's repos or of a plain CLIP, to this format and back",
        "llm2clip.convert.conversion",
        "ConvertConfig",
        positional=("source", "destination"),
    ),
    "build": Command(
        "a self-contained folder with code, card and licence, ready for the Hub",
        "llm2clip.hub.build",
        "BuildConfig",
        positional=("model", "destination"),
        optional=("destination",),
    ),
    "push": Command(
        "check a built folder and upload it to the Hub",
        "llm2clip.hub.push",
        "PushConfig",
        positional=("folder", "repo_id"),
    ),
    "export-onnx": Command(
        "a model's vision and text graphs as ONNX files, compared with torch",
        "llm2clip.hub.export_onnx",
        "ExportOnnxConfig",
        positional=("model",),
        extra="onnx",
    ),
    "index": Command(
        "the images of a folder or data set as a search index; run again, it embeds what has changed",
        "llm2clip.search.index",
        "IndexConfig",
        positional=("folder",),
        extra="search",
    ),
    "search": Command(
        "the images of an index that fit a text or another image",
        "llm2clip.search.search",
        "SearchConfig",
        positional=("index", "query"),
        extra="search",
    ),
    "demo": Command(
        "a page in the browser: search, classification, heat maps, two models side by side",
        "llm2clip.demo.job",
        "DemoConfig",
        positional=(),
        extra="demo",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    top = argparse.ArgumentParser(
        prog="llm2clip",
        description="LLM2CLIP: a large language model as CLIP's text encoder.",
        epilog="llm2clip COMMAND --help shows every setting of a command with its default.",
    )
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)
    name = top.parse_args(arguments[:1]).command
    command = COMMANDS[name]
    traceback = "--traceback" in arguments
    with command_logs() as log_file:
        try:
            return _run(name, command, [argument for argument in arguments[1:] if argument != "--traceback"], log_file)
        except USER_ERRORS as error:
            logger.debug("llm2clip %s failed", name, exc_info=True)
            if traceback or type(error) is KeyError:
                raise
            close_bars()
            print(f"llm2clip {name}: error: {_message(error, name)}\n(--traceback shows where)", file=sys.stderr)
            return 2


def _message(error: Exception, name: str) -> str:
    """The message of a command's error, also of one that a DataLoader's worker raised, where it ends a traceback."""
    text = str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if text.startswith("Repo id must "):
        text = f"there is no such folder, and no Hub id is written like that: {text}"
    if isinstance(error, ModuleNotFoundError):
        text += f"; pip install 'llm2clip[{COMMANDS[name].extra}]' brings what llm2clip {name} needs"
    return text


def _run(name: str, command: Command, arguments: list[str], log_file: LogFile) -> int:
    module: Any = importlib.import_module(command.module)
    quiet_libraries()
    config_class = getattr(module, command.config)
    parser = argparse.ArgumentParser(prog=f"llm2clip {name}", description=command.help, allow_abbrev=False)
    if command.positional == ("recipe",):
        parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file of settings, or a packaged recipe")
    else:
        helps = {field.name: field.metadata["help"] for field in fields(config_class) if field.metadata}
        lists = [field.name for field in fields(config_class) if field.default_factory is list]
        for positional in command.positional:
            number: dict[str, Any] = {}
            if positional in lists or positional in command.optional:
                # Left out, it keeps its default.
                number = {"nargs": "*" if positional in lists else "?", "default": argparse.SUPPRESS}
            parser.add_argument(positional, metavar=positional.upper(), help=helps[positional], **number)
    if command.resumes:
        parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add_fields(parser, config_class, skip=command.positional)
    # Intermixed, so that a list of arguments may stand after an option.
    namespace, unknown = parser.parse_known_intermixed_args(complete_flags(arguments, config_class))
    if unknown and not unknown[0].startswith("-"):
        raise ValueError(f"the argument {unknown[0]!r} is one too many; put quotes around a text of several words.")
    if unknown:
        option = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        known = [field.name for field in fields(config_class)]
        raise ValueError(f"there is no option {unknown[0]}{nearest(option, known)}")
    values, origin = given_fields(namespace, config_class), f"llm2clip {name}"
    if command.positional == ("recipe",) and namespace.recipe is not None:
        path = find_recipe(namespace.recipe)
        values, origin = {**load_recipe(path), **values}, str(path)
    config = build_config(config_class, values, origin)
    if command.writes_log and config.output_dir and is_main_process():
        logger.info("llm2clip %s: %s\nLog: %s", name, command.help, log_file.open(config.output_dir))
    else:
        log_file.discard()
    result = module.run(config, resume=namespace.resume) if command.resumes else module.run(config)
    _end(result or {})
    return 0


def _end(result: dict[str, Any]) -> None:
    """Print the result once, and part from the other processes of a launcher."""
    from llm2clip.utils.processes import leave_process_group, process_state

    if process_state().is_main_process:
        for key, value in result.items():
            print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
    leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
