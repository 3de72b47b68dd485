"""How commands of the documents are tested: by default run on small stand-ins, as these rules and markers say."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.documents.stand_ins import LLM_1B, LLM_8B, MODEL


@dataclass(frozen=True)
class How:
    """How a command is tested.

    Attributes:
        needs: Paths and Hub ids that have to be there, beside those that the command and its recipe name.
        small: Options that are appended, so that it ends soon, on a CPU.
        makes: Paths that it leaves, beside those that it names as its output.
        prints: What it prints, in part.
        slow: Whether it is left to the slow tests.
        serves: Whether it serves a page until it is interrupted.
        reads: Words of it, and what it reads in their place.
        not_run: Why only its parser looks at it.
        run_by: The test that runs it instead: file and name.
    """

    needs: tuple[str, ...] = ()
    small: str = ""
    makes: tuple[str, ...] = ()
    prints: str = ""
    slow: bool = False
    serves: bool = False
    reads: dict[str, str] = field(default_factory=dict)
    not_run: str = ""
    run_by: str = ""

    def __or__(self, other: How) -> How:
        return How(
            needs=(*self.needs, *other.needs),
            small=f"{self.small} {other.small}".strip(),
            makes=(*self.makes, *other.makes),
            prints=other.prints or self.prints,
            slow=self.slow or other.slow,
            serves=self.serves or other.serves,
            reads={**self.reads, **other.reads},
            not_run=other.not_run or self.not_run,
            run_by=other.run_by or self.run_by,
        )


# What the placeholders of the documents stand for, and what two processes on a CPU read in place of many.
MEANT = {
    "MODEL": MODEL,
    "OWNER": "tester",
    "NAME": "example",
    "FOLDER": "space",
    "SOURCE": "openai/clip-vit-base-patch16",
    "DESTINATION": "tower",
    "RECIPE": "stage2_paper",
    "llm2clip mntp": "llm2clip mntp mntp",
    "--nproc_per_node N": "--nproc_per_node 2",
    "--nproc_per_node 8": "--nproc_per_node 2",
    "--nnodes 8": "--nnodes 1",
    "HOST:29500": "localhost:0",
    "--ray-address auto": "--ray-actors 1",
    "ddp_8gpu.yaml": "ddp_8gpu.yaml --num_processes 2 --cpu",
}
CPU = "--use-cpu true --max-steps 2 --per-device-train-batch-size 4"
# What holds for every command that has some words, as a regular expression.
RULES = {
    r"^(make|pip|jupyter|npm|hf|img2dataset|\.ci/run|python -m tests\.)": How(not_run="it is not ours, or runs tests"),
    r"^(torchrun|accelerate) |--engine ray": How(slow=True),
    r"llm2clip (stage1|mntp)": How(small=f"{CPU} --warmup-steps 0 --attn-implementation sdpa --lora-rank 2"),
    r"llm2clip mntp": How(small="--block-size 64"),
    r"llm2clip embed": How(small="--attn-implementation sdpa"),
    r"llm2clip stage2 ": How(small=f"{CPU} --dataloader-num-workers 0"),
    r"stage2 (stage2_(paper|table1)|RECIPE|--vision)": How(small="--projection-dim 16"),
    r"stage2 stage2_small_gpu": How(small="--freeze-vision-layers 1"),
    r"llm2clip stage1 stage1_paper --model-name-or-path": How(
        not_run="it runs with its config",
        run_by="tests/documents/test_commands.py::test_stage_1_gives_the_text_tower_of_the_config",
    ),
    r"llm2clip quickstart": How(
        needs=("default.yaml",), small="--profile default.yaml --embedding-model none", makes=(MODEL,), slow=True
    ),
    r"llm2clip (export-onnx|plan stage)": How(slow=True),
    r"llm2clip demo --index": How(serves=True, slow=True),
    r"llm2clip distill-text": How(small=CPU),
    r"llm2clip push": How(small="--no-check"),  # `build` has just loaded it in a new process
    r"llm2clip convert microsoft/": How(prints="missing: none"),
    # The shapes are those of the real ones.
    r"llm2clip convert (EVA02_CLIP|microsoft/LLM2CLIP-(EVA02|Openai|Llama3))": How(
        needs=(f"microsoft/{LLM_1B}", f"microsoft/{LLM_8B}"), slow=True
    ),
    r"llm2clip evaluate [^-].*\b(docci|flickr30k)\b": How(
        not_run="published sets are not downloaded",
        run_by="tests/llm2clip/evaluation/test_evaluate.py"
        "::test_a_strangers_benchmark_is_measured_printed_and_found_again",
    ),
    # By default, tests/examples runs each script in the process of the tests.
    r"^python examples/": How(needs=(MODEL,), slow=True),
    r"examples/multimodal_llm\.py": How(
        needs=("questions", "runs/quickstart/weights/smollm2-135m-instruct"), small="--steps 2"
    ),
    r"studies\.miniature\.questions": How(
        not_run="it draws 2,500 pictures", run_by="tests/studies/test_questions.py::test_the_files_have_pictures"
    ),
}
