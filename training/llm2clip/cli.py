"""The `llm2clip` command: one subcommand per job."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import itertools
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm2clip.command_line.logs import TerminalHandler, command_logs, print_whole, printable, quiet_libraries
from llm2clip.command_line.options import HelpEntry, OptionParser, format_help, option_groups, unknown_option
from llm2clip.command_line.progress import close_bars, is_main_process
from llm2clip.command_line.settings import nearest
from llm2clip.command_line.stopping import (
    INTERRUPTED,
    TERMINATED,
    StoppedError,
    ignore_ended_workers,
    on_sigterm,
    stop_behind,
    stop_now,
)
from llm2clip.files.library_errors import PEER_ENDED, explain
from llm2clip.recipes import build_settings, find_recipe

logger = logging.getLogger(__name__)

# Errors that a user can fix end in one line. All others are bugs and keep their traceback, as does a plain KeyError;
# subclasses of KeyError carry a message (a caption that the cache lacks).
USER_ERRORS = (ValueError, OSError, ImportError, KeyError)


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: Module of its settings class and its `run`. It is imported only when the command runs, since its
            libraries take seconds to import.
        config: Name of the settings class.
        positional: The positional arguments: a recipe, or the fields of these names. A field that is a list accepts
            any number of arguments.
        optional: The positional arguments that may be omitted.
        writes_log: Whether it writes `log.txt` in its `output_dir`.
        resumable: Whether the same command goes on where it was stopped.
        extra: The extra of this package that installs its libraries.
        passes_on: The field for arguments that are no settings of the command.
    """

    help: str
    module: str
    config: str
    positional: tuple[str, ...] = ("recipe",)
    optional: tuple[str, ...] = ()
    resumes: bool = False
    writes_log: bool = False
    resumable: bool = False
    extra: str = "train"
    passes_on: str = ""

    @property
    def reads_recipe(self) -> bool:
        """Whether its settings come from a recipe."""
        return self.positional == ("recipe",) and not self.passes_on


# fmt: off
COMMANDS = {
    "quickstart": Command("run both stages, evaluation and export on the bundled data",
                          "llm2clip.quickstart.quickstart", "QuickstartConfig", (), writes_log=True, resumable=True),
    "mntp": Command("train masked next token prediction (optional, before stage 1)",
                    "llm2clip.trainers.run_mntp", "MNTPRecipe", resumes=True, writes_log=True),
    "stage1": Command("fine-tune the LLM on caption pairs with a contrastive loss",
                      "llm2clip.trainers.run_stage1", "Stage1Recipe", resumes=True, writes_log=True),
    "embed": Command("embed all captions with the LLM, into a cache or beside their shards (resumable)",
                     "llm2clip.encoders.embed", "EmbedConfig", writes_log=True, resumable=True),
    "verify": Command("check the files of any folder that llm2clip wrote, and say how to fix it",
                      "llm2clip.verification.verify", "VerifyConfig", ("folder",)),
    "align": Command("align two frozen towers in closed form, without training",
                     "llm2clip.trainers.run_align", "AlignRecipe", writes_log=True, resumable=True),
    "stage2": Command("train the vision tower and adapter on cached embeddings",
                      "llm2clip.trainers.run_stage2", "Stage2Recipe", resumes=True, writes_log=True),
    "distill-text": Command("teach a small text encoder the space of a model, for queries in milliseconds",
                            "llm2clip.trainers.run_distill", "DistillRecipe", ("model",), resumes=True,
                            writes_log=True),
    "plan": Command("say what a recipe takes before it is started: memory of a GPU, hours, disk",
                    "llm2clip.planning.plan", "PlanConfig", ("recipe",), passes_on="overrides"),
    "evaluate": Command("measure models on published benchmarks and on your own images and captions",
                        "llm2clip.evaluation.evaluate", "EvaluateConfig", ("model",), optional=("model",),
                        extra="eval"),
    "report": Command("show results of evaluations as a table, beside published numbers",
                      "llm2clip.evaluation.report", "ReportConfig", ("results",), extra="eval"),
    "check-data": Command("show what is in a data set or published set, and what is wrong with it",
                          "llm2clip.checks.check_data", "CheckDataConfig", ("source",), optional=("source",),
                          extra="eval"),
    "convert": Command(
        "convert checkpoints of the original code, of Microsoft's repos and of CLIP to this format and back",
        "llm2clip.convert.conversion", "ConvertConfig", ("source", "destination")),
    "merge": Command("average the weights of two models (WiSE-FT)",
                     "llm2clip.hub.merge", "MergeConfig", ("first", "second", "destination")),
    "build": Command("build a self-contained folder for the Hub, with code, model card and license",
                     "llm2clip.hub.build", "BuildConfig", ("model", "destination"), optional=("destination",)),
    "push": Command("check a built folder and upload it to the Hub",
                    "llm2clip.hub.push", "PushConfig", ("folder", "repo_id"), resumable=True),
    "export-onnx": Command("export the vision and text graphs to ONNX and compare them with torch",
                           "llm2clip.hub.export_onnx", "ExportOnnxConfig", ("model",)),
    "index": Command("index images or captions for search; a second run embeds only what has changed",
                     "llm2clip.search.index", "IndexConfig", ("folder",), resumable=True, extra="search"),
    "search": Command("search an index with a text or an image",
                      "llm2clip.search.search", "SearchConfig", ("index", "query"), extra="search"),
    "tags": Command("write the labels that fit each image of an index best to a file",
                    "llm2clip.search.tags", "TagsConfig", ("index", "labels"), extra="search"),
    "serve": Command("serve embeddings of texts and images, and searches, over HTTP (OpenAI's API)",
                     "llm2clip.serving.serve", "ServeConfig", ("model",), extra="search"),
    "demo": Command("open a demo in the browser: search, classification, heat maps, comparison of two models",
                    "llm2clip.demo.demo", "DemoConfig", (), extra="demo"),
}
# fmt: on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with its arguments, by default those of the process, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    if name in ("--help", "-h"):
        print_whole(_overview())
        return 0
    if not arguments:
        print(_overview(), file=sys.stderr)
        return 2
    if name == "--version":
        print(_versions())
        return 0
    if name not in COMMANDS:
        message = f"there is no command {name!r}{nearest(name, COMMANDS)} `llm2clip --help` lists the commands."
        print(printable(f"llm2clip: error: {message}"), file=sys.stderr)
        return 2
    rest = [argument for argument in arguments[1:] if argument != "--traceback"]
    with command_logs() as terminal, on_sigterm(stop_now):
        try:
            result = _run(name, rest, terminal)
        except (KeyboardInterrupt, StoppedError) as stop:
            return _stopped(name, stop, terminal.log)
        except Exception as error:
            if behind := stop_behind(error):
                return _stopped(name, behind, terminal.log)
            # A launcher ends the others as soon as one process has ended, perhaps one that has only lost this one.
            with on_sigterm(lambda: None):
                return _failed(name, error, terminal.log, "--traceback" in arguments)
    # Imported here, because it imports torch, which --help must not wait for.
    from llm2clip.command_line.processes import leave_process_group, process_state
    from llm2clip.command_line.tables import print_values

    if process_state().is_main_process:
        print_values(result)
    leave_process_group()
    return 0


def _run(name: str, arguments: list[str], terminal: TerminalHandler) -> dict[str, Any]:
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the argument {argument!r} is not valid UTF-8; use a terminal, and file names, in UTF-8."
            ) from None
    command = COMMANDS[name]
    module: Any = importlib.import_module(command.module)
    quiet_libraries()
    config_class = getattr(module, command.config)
    if asked := {"--help", "-h", "--help-all"} & set(arguments):
        print_whole(_help(name, config_class, "--help-all" in asked))
        return {}
    values, unknown = _parser(command, config_class).read(arguments)
    if unknown and not command.passes_on:
        raise ValueError(unknown_option(unknown[0], [config_class]))
    if unknown:
        values[command.passes_on] = unknown
    resume = values.pop("resume", False)
    recipe = values.pop("recipe", None) if command.reads_recipe else None
    config = build_settings(config_class, None if recipe is None else find_recipe(recipe), values)
    writes_log = command.writes_log and config.output_dir and "://" not in config.output_dir
    if writes_log:
        log = terminal.open_log(config.output_dir)
        if is_main_process():
            logger.info("llm2clip %s: %s\nLog: %s", name, command.help, log)
    terminal.shows_warnings = not writes_log
    with _named_weights(config):
        return (module.run(config, resume=resume) if command.resumes else module.run(config)) or {}


@contextlib.contextmanager
def _named_weights(config: Any) -> Iterator[None]:
    """Name the file of weights whose damage safetensors reports, which does not say where it is."""
    try:
        yield
    except SafetensorError as error:
        from llm2clip.models.repos import local_folders  # which imports torch

        lists = (value if isinstance(value, list) else [value] for value in vars(config).values())
        names = [name for name in itertools.chain.from_iterable(lists) if isinstance(name, str)]
        for folder in itertools.chain.from_iterable(map(local_folders, names)):
            for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
                try:
                    with safe_open(path, framework="pt"):
                        pass
                except SafetensorError:
                    raise ValueError(
                        f"{path} is damaged or cut short ({error}); copy, download or build it again."
                    ) from error
        raise


def _failed(name: str, error: Exception, log: Path | None, raises: bool) -> int:
    """Report an error, and return the exit code.

    Args:
        raises: Raise every error again, and not only bugs.
    """
    ignore_ended_workers()
    logger.debug("llm2clip %s failed (process id %d)", name, os.getpid(), exc_info=error)
    known = isinstance(error, USER_ERRORS) and type(error) is not KeyError
    if raises or not (known or explain(error)):
        raise error
    close_bars()
    # An error with a status of its own is the result of the command, which needs no traceback.
    status = getattr(error, "exit_status", None)
    where = "--traceback shows where" if log is None else f"where: {log}"
    ending = f"\n({where})" if status is None else ""
    print(printable(f"llm2clip {name}: error: {_message(error, name)}{ending}"), file=sys.stderr)
    return status or 2


def _stopped(name: str, stop: KeyboardInterrupt | StoppedError, log: Path | None) -> int:
    """Say how to go on after Ctrl-C or SIGTERM; returns the exit code."""
    logger.debug("llm2clip %s was stopped", name, exc_info=True)
    close_bars()
    status, cause = (INTERRUPTED, "Ctrl-C") if isinstance(stop, KeyboardInterrupt) else (TERMINATED, "SIGTERM")
    if status == TERMINATED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        cause += f" (unless you have sent it, {PEER_ENDED})"
    if is_main_process():
        print(f"llm2clip {name}: stopped by {cause}; {_resume_hint(name, log)}", file=sys.stderr, flush=True)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # The other processes may be in the middle of a collective operation, for which an orderly end would wait.
        logging.shutdown()
        os._exit(status)
    return status


def _resume_hint(name: str, log: Path | None) -> str:
    """Say in words how a stopped command is continued."""
    command = COMMANDS[name]
    if command.resumes and log is not None:
        from llm2clip.trainers.checkpoints import last_checkpoint

        # The last part of a recipe writes into the folder itself, the others into part1, part2.
        parts = sorted(log.parent.glob("part[0-9]*"), key=lambda folder: (len(folder.name), folder.name), reverse=True)
        # By sizes alone: --resume reads the contents, and here the other processes may have ended.
        found = (last_checkpoint(folder, contents=False) for folder in (log.parent, *parts))
        checkpoint = next(filter(None, found), None)
        return "it has no checkpoint yet." if checkpoint is None else f"add --resume to go on from {checkpoint}."
    return f"the same command {'continues where it was' if command.resumable else 'starts it again'}."


def _parser(command: Command, config_class: Any) -> OptionParser:
    parser = OptionParser(config_class, skip=command.positional)
    if command.reads_recipe:
        parser.add_argument("recipe", nargs="?")
    for positional in () if command.reads_recipe else command.positional:
        # An omitted argument keeps the default of its field.
        nargs = _repeats(command, config_class, positional)
        omitted: dict[str, Any] = {"nargs": nargs, "default": argparse.SUPPRESS} if nargs else {}
        parser.add_argument(positional, **omitted)
    if command.resumes:
        parser.add_argument("--resume", action="store_true")
    return parser


def _repeats(command: Command, config_class: Any, positional: str) -> str | None:
    """Tell how often a positional argument may be given, as argparse says it."""
    factory = config_class.__dataclass_fields__[positional].default_factory
    if factory is not dataclasses.MISSING and factory() == []:
        return "*"
    return "?" if positional in command.optional else None


def _help(name: str, config_class: Any, everything: bool) -> str:
    command = COMMANDS[name]
    positional: list[HelpEntry] = [
        ("RECIPE", "YAML file of settings, or a packaged recipe by name; options override it.")
    ]
    usage = f"llm2clip {name} [RECIPE]"
    if not command.reads_recipe:
        forms = {None: "{}", "?": "[{}]", "*": "[{} ...]"}
        words = [forms[_repeats(command, config_class, field)].format(field.upper()) for field in command.positional]
        usage = " ".join(["llm2clip", name, *words])
        fields = config_class.__dataclass_fields__
        positional = [(field.upper(), fields[field].metadata["help"]) for field in command.positional]
    switches = [("--resume", "Continue from the newest checkpoint in output_dir.")] if command.resumes else []
    switches += [("--traceback", "Show the traceback of an error."), ("--help", "Show this.")]
    groups = option_groups(config_class, command.positional, everything)
    ending = "All other options are those of the recipe's command." if command.passes_on else ""
    if len(groups) > 1 and not everything:
        count = sum(field.init for field in dataclasses.fields(config_class))
        ending = f"`llm2clip {name} --help-all` shows all {count} options, and their whole texts."
    groups = {"arguments": positional, **groups, "general": switches}
    return format_help(f"{usage} [OPTIONS]", _sentence(command.help), groups, ending)


def _overview() -> str:
    commands = [(name, _sentence(command.help)) for name, command in COMMANDS.items()]
    switches = [("--version", "Show the versions of llm2clip, torch and transformers."), ("--help", "Show this.")]
    return format_help(
        "llm2clip COMMAND [OPTIONS]",
        "LLM2CLIP: a large language model as CLIP's text encoder.",
        {"commands": commands, "options": switches},
        "`llm2clip COMMAND --help` lists the settings of a command with their defaults.",
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _versions() -> str:
    """Versions of what runs, without importing it, which takes seconds."""
    llm2clip, torch, transformers = map(importlib.metadata.version, ("llm2clip", "torch", "transformers"))
    return f"llm2clip {llm2clip} (torch {torch}, transformers {transformers}, Python {platform.python_version()})"


def _message(error: Exception, name: str) -> str:
    """Return the message of an error; a DataLoader's worker hides it at the end of a traceback."""
    text = explain(error) or str(error)
    if "Original Traceback (most recent call last)" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if text.startswith("Repo id must "):
        text = f"there is no such folder, and it is not a valid Hub id: {text}"
    if isinstance(error, ModuleNotFoundError):
        text += f"; pip install 'llm2clip[{COMMANDS[name].extra}]' installs what llm2clip {name} needs"
    return text
