"""Every command in the documents, and how the tests run it: its stand-ins, options that make it small, its output."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llm2clip.convert.published import FOLDER, Published, published_models
from tests.documents.stand_ins import E5, HUB, LLM_1B, LLM_8B, MINILM, MODEL


@dataclass(frozen=True)
class Run:
    """A command that is run.

    Attributes:
        needs: What has to be there: files and folders, Hub ids (see `stand_ins`), or commands that ran before.
        meant: Words that stand for something, and what the reader would write.
        small: Options that are appended, so that it ends soon, on a CPU.
        makes: What it leaves: paths, or Hub ids.
        prints: What it prints, in part.
        check: Looks at the folder afterwards.
        serves: Whether it serves a page until it is interrupted.
        slow: Whether it is left to the slow tests.
    """

    needs: tuple[str, ...] = ()
    meant: dict[str, str] = field(default_factory=dict)
    small: str = ""
    makes: tuple[str, ...] = ()
    prints: str = ""
    check: Callable[[Path], None] | None = None
    serves: bool = False
    slow: bool = False


@dataclass(frozen=True)
class NotRun:
    """A command that only its own check looks at (see `test_commands`).

    Attributes:
        reason: Why.
        run_by: The test that runs it: file and name.
    """

    reason: str
    run_by: str = ""


def same_prompt(name: str, folder: Path) -> None:
    """Check that the LLM of stage 1 encodes captions as a folder of `hub_configs` says."""
    fields = [
        json.loads(path.read_text()) for path in (folder / "runs/stage1/config.json", FOLDER / name / "config.json")
    ]
    for key in ("prompt_prefix", "prompt_suffix", "pooling", "max_text_length", "bidirectional"):
        assert fields[0][key] == fields[1][key], key


def llm_of(model: Published) -> list[str]:
    """The Hub id of a published model's LLM, if there is one."""
    name = model.config.text_model_name_or_path if model.is_joint else None
    return [name] if name in HUB else []


# The paper's settings on a CPU: two steps of four rows.
CPU = "--use-cpu true --max-steps 2 --per-device-train-batch-size 4"
STAGE1 = f"{CPU} --attn-implementation sdpa --lora-rank 2"
TUNE = f"{CPU} --dataloader-num-workers 0 --freeze-vision-layers 1"
STAGE2 = f"{CPU} --dataloader-num-workers 0 --projection-dim 16"
EMBED = "--attn-implementation sdpa"

INDEX = "llm2clip index examples/data/concepts --split test --model runs/quickstart/llm2clip"
INDEX_CAPTIONS = f"{INDEX} --embed caption --caption-columns caption keywords"
TRAIN_LLM = "llm2clip stage1 stage1_paper --output-dir runs/stage1"
EMBED_CAPTIONS = "llm2clip embed embed_paper"
TRAIN_VISION = "llm2clip stage2 stage2_paper --learning-rate 2e-5"
TUNE_MODEL = "llm2clip stage2 stage2_small_gpu --bf16 true"
EMBED_MINE = (
    "llm2clip embed --text-model-name-or-path runs/stage1 --output-dir runs/mine_cache "
    "--sources '[{path: data/mine, split: train+validation, caption_columns: [caption]}]'"
)
EMBED_CLIP = (
    "llm2clip embed --text-model-name-or-path openai/clip-vit-large-patch14-336 --output-dir runs/clip_cache "
    "--sources '[{path: data/mine, split: train+validation, caption_columns: [caption]}]'"
)
BUILD = "llm2clip build runs/stage2 Llama-my-model"
MERGE = (
    "llm2clip merge openai/clip-vit-large-patch14-336 runs/stage2 runs/merged --alpha 0 0.25 0.5 0.75 1 "
    "--eval-source ./my_images --caption-columns caption"
)
MUSEUM = "llm2clip evaluate runs/quickstart/llm2clip --benchmark museum.py --data ./data"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PAIRS = ("data/dreamlip", "data/text_pairs")
TOWER = "openai/clip-vit-large-patch14-336"
LAUNCH = "accelerate launch --config_file training/llm2clip/recipes/accelerate"
CI = ".ci/run runs it"
DATABASE = "postgresql://me@localhost/images"
NO_SERVER = "the documents' tests have no database"
IN_POSTGRES = "tests/llm2clip/search/test_search_index.py::test_all_stores_give_equal_answers_with_any_model"
NO_STORE = "the documents' tests have no object store"
IN_S3 = "tests/llm2clip/search/test_s3_index.py::test_a_run_killed_by_a_signal_leaves_the_index_in_s3_and_is_resumed"
MAKE_SITE = "python examples/web/make_site.py examples/data/concepts --split test"
IN_CHROMIUM = "tests/examples/test_web.py::test_the_page_finds_what_torch_finds"
NO_SETS = "published sets are not downloaded"
MEASURED = "tests/llm2clip/evaluation/test_evaluate.py::test_a_strangers_benchmark_is_measured_printed_and_found_again"

README = {
    INDEX: Run(needs=("examples", MODEL), makes=("runs/index/concepts",), prints="embedded: 695"),
    'llm2clip search runs/index/concepts "someone riding a bicycle" "a vehicle that carries heavy goods" '
    "--top 6 --html results.html": Run(needs=(INDEX,), makes=("results.html",)),
    'llm2clip search runs/index/concepts "someone riding a bicycle" --where "caption LIKE \'%bicycle%\'"': Run(
        needs=(INDEX,)
    ),
    INDEX_CAPTIONS: Run(needs=("examples", MODEL), makes=("runs/index/concepts_captions",), prints="captions: 1"),
    'llm2clip search runs/index/concepts_captions "someone riding a bicycle" --image photo.jpg --html page.html': Run(
        needs=(INDEX_CAPTIONS, "photo.jpg"), makes=("page.html",), prints="photo.jpg\t"
    ),
    f"{INDEX} --truncate-dim 128": NotRun(
        "the model of the documents' tests is narrower",
        run_by="tests/llm2clip/search/test_search_index.py::"
        "test_an_index_of_truncated_embeddings_opens_its_model_with_their_width",
    ),
    f"{INDEX} --postgres {DATABASE}": NotRun(NO_SERVER, run_by=IN_POSTGRES),
    f'llm2clip search concepts "someone riding a bicycle" --postgres {DATABASE} '
    "--where \"caption LIKE '%bicycle%'\"": NotRun(NO_SERVER, run_by=IN_POSTGRES),
    f"{INDEX} --output-dir s3://my-bucket/concepts": NotRun(NO_STORE, run_by=IN_S3),
    'llm2clip search s3://my-bucket/concepts "someone riding a bicycle"': NotRun(NO_STORE, run_by=IN_S3),
    "llm2clip demo --index runs/index/concepts": Run(needs=(INDEX,), serves=True, slow=True),
    "llm2clip export-onnx MODEL": Run(
        needs=(MODEL,),
        meant={"MODEL": MODEL},
        makes=(f"{MODEL}/onnx/vision_model.onnx", f"{MODEL}/onnx/text_model.onnx"),
        slow=True,
    ),
    "llm2clip export-onnx MODEL --layout transformers.js --dtype int8 --output-dir exported "
    "--eval-sources '{test: {path: examples/data/concepts, split: test, caption_columns: [caption]}}'": Run(
        needs=("examples", MODEL),
        meant={"MODEL": MODEL},
        makes=("exported/onnx/text_model_quantized.onnx", "exported/preprocessor_config.json"),
        prints="test_exported_texts",
        slow=True,
    ),
    "llm2clip export-onnx MODEL --layout immich --output-dir immich": Run(
        needs=(MODEL,),
        meant={"MODEL": MODEL},
        makes=("immich/visual/model.onnx", "immich/visual/preprocess_cfg.json", "immich/textual/model.onnx"),
        slow=True,
    ),
    **{
        command: Run(
            needs=("examples", MODEL),
            meant={"MODEL": MODEL},
            makes=("site/search.js", "site/index/vectors.bin", "site/index/0.webp"),
        )
        for command in (MAKE_SITE, f"{MAKE_SITE} --model MODEL")
    },
    "llm2clip export-onnx MODEL --layout transformers.js --parts text --dtype int8 --output-dir site/model": Run(
        needs=(MODEL,), meant={"MODEL": MODEL}, makes=("site/model/onnx/text_model_quantized.onnx",), slow=True
    ),
    "npm install --prefix site @huggingface/transformers": NotRun("it downloads", run_by=IN_CHROMIUM),
    "python -m http.server --directory site": NotRun("it serves until it is stopped", run_by=IN_CHROMIUM),
    "llm2clip quickstart --llm Qwen/Qwen2.5-0.5B --vision-model openai/clip-vit-base-patch16 --data ./my_images "
    "--caption-columns short_caption long_caption": Run(
        needs=("Qwen/Qwen2.5-0.5B", "openai/clip-vit-base-patch16", "my_images", "default.yaml"),
        small="--profile default.yaml --embedding-model none",
        makes=(f"{MODEL}/model.safetensors", "runs/quickstart/report.html"),
        prints="LLM after stage 1",
        slow=True,
    ),
    "llm2clip --version": Run(prints="transformers 5"),
    "llm2clip stage2 --help": Run(prints="--alignment"),
    "llm2clip check-data ./my_images --split train --caption-columns caption": Run(
        needs=("my_images",), prints="24, of which 24 can be used"
    ),
    TRAIN_LLM: Run(needs=(LLAMA, *PAIRS), small=STAGE1, makes=("runs/stage1/model.safetensors",)),
    EMBED_CAPTIONS: Run(
        needs=(TRAIN_LLM, "data/cc3m"), small=EMBED, makes=("runs/cache/0.emb.manifest",), prints="num_captions: "
    ),
    EMBED_MINE: Run(
        needs=(TRAIN_LLM, "data/mine"), makes=("runs/mine_cache/index.manifest",), prints="num_captions: "
    ),
    "llm2clip embed --dtype float16": Run(
        needs=(TRAIN_LLM, "data/cc3m"),
        meant={"embed": "embed embed_paper"},
        small=EMBED,
        makes=("runs/cache/0.emb.manifest",),
    ),
    TRAIN_VISION: Run(
        needs=(EMBED_CAPTIONS, TOWER),
        small=STAGE2,
        makes=("runs/stage2/model.safetensors", "runs/stage2/README.md"),
    ),
    (
        "llm2clip stage2 stage2_paper --output-dir runs/stage2_lora --embedding-cache null --lora-rank 16 "
        "--text-learning-rate 1e-4 --tower-chunk-size 32"
    ): Run(
        needs=(EMBED_CAPTIONS, TOWER),
        small=f"{STAGE2} --lora-rank 2",
        makes=("runs/stage2_lora/model.safetensors", "runs/stage2_lora/README.md"),
    ),
    TUNE_MODEL: Run(needs=(TRAIN_VISION, EMBED_MINE), small=TUNE, makes=("runs/mine/model.safetensors",)),
    EMBED_CLIP: Run(needs=(TOWER, "data/mine"), makes=("runs/clip_cache/index.manifest",), prints="num_captions: "),
    (
        "llm2clip stage2 --vision-model-name-or-path openai/clip-vit-large-patch14-336 --output-dir runs/stage2_two "
        "--text-model-name-or-path runs/stage1 openai/clip-vit-large-patch14-336 "
        "--embedding-cache runs/mine_cache runs/clip_cache "
        "--sources '[{path: data/mine, split: train, caption_columns: [caption]}]' --text-losses all"
    ): Run(
        needs=(EMBED_MINE, EMBED_CLIP, TOWER),
        small=STAGE2,
        makes=("runs/stage2_two/model.safetensors", "runs/stage2_two/second_tokenizer.json"),
    ),
    "llm2clip evaluate runs/stage2 --benchmark ./my_images --caption-columns caption": Run(
        needs=(TRAIN_VISION, "my_images"), prints="T2I R@1 / 5 / 10"
    ),
    "llm2clip check-data --benchmark museum.py --data ./data --tokenizer runs/quickstart/llm2clip": Run(
        needs=(MODEL, "museum.py", "data/museum"), prints="Captions, length in tokens"
    ),
    "llm2clip report results/*.json --paper --output table.md": Run(
        needs=(MUSEUM,), makes=("table.md", "table-models.png"), prints="Museum"
    ),
    MUSEUM: Run(
        needs=(MODEL, "museum.py", "data/museum"),
        makes=("results/runs--quickstart--llm2clip.museum.raw.json",),
        prints="Museum",
    ),
    "llm2clip evaluate --list --benchmark docci --data ./data": Run(needs=("data/museum",), prints="docci  DOCCI"),
    "llm2clip evaluate --list --data ./data": Run(needs=("data/museum",), prints="urban1k"),
    "llm2clip evaluate --list --benchmark docci long": Run(prints="urban1k  Urban1k"),
    "llm2clip evaluate runs/stage2 --benchmark fashion-mnist fashion-mnist-probe-sgd fashion-mnist-probe-lbfgs "
    "--data /usr/share/datasets": NotRun(
        "minutes, and a data set",
        run_by="tests/llm2clip/evaluation/test_evaluate_classification.py::"
        "test_the_whole_of_fashion_mnist_runs_from_the_documented_command",
    ),
    MERGE: Run(
        needs=(TRAIN_VISION, TOWER, "my_images"),
        makes=("runs/merged/model.safetensors", "runs/merged/curve.png"),
        prints="alpha: ",
    ),
    BUILD: Run(needs=(TRAIN_VISION,), makes=("Llama-my-model/model.safetensors", "Llama-my-model/NOTICE")),
    "llm2clip verify runs": Run(needs=(TRAIN_VISION,), prints="num_files: "),
    "llm2clip verify Llama-my-model": Run(needs=(BUILD,), prints="num_files: "),
    **dict.fromkeys(
        (
            "python -m model_signing sign key Llama-my-model --private_key key.pem "
            "--signature Llama-my-model/model.sig "
            "--ignore-paths Llama-my-model/README.md --ignore-paths Llama-my-model/LICENSE "
            "--ignore-paths Llama-my-model/.llm2clip.json",
            "python -m model_signing verify key download --signature download/model.sig --public_key key.pub "
            "--ignore-paths download/.cache",
            "python -m model_signing sign sigstore --help",
        ),
        NotRun(
            "it needs a key",
            run_by="tests/llm2clip/hub/test_signing.py::test_a_pushed_model_is_that_of_its_author",
        ),
    ),
    "llm2clip push Llama-my-model OWNER/Llama-my-model --dry-run": Run(
        needs=(BUILD,), meant={"OWNER": "tester"}, small="--no-check", prints="would_upload_to: tester/Llama-my-model"
    ),
    "llm2clip push Llama-my-model OWNER/Llama-my-model": Run(
        needs=(BUILD,),
        meant={"OWNER": "tester"},
        small="--no-check",  # `build` has just loaded it in a new process
        makes=("tester/Llama-my-model",),
        prints="/tester/Llama-my-model",
    ),
    "llm2clip mntp": Run(
        needs=("meta-llama/Llama-3.2-1B-Instruct", "Salesforce/wikitext", "data/captions"),
        meant={"mntp": "mntp mntp"},
        small=f"{STAGE1} --block-size 64",
        makes=("runs/mntp/model.safetensors",),
    ),
    "torchrun --nproc_per_node N -m llm2clip stage2 RECIPE": Run(
        needs=(TRAIN_VISION, EMBED_MINE),
        meant={"N": "2", "RECIPE": "stage2_small_gpu"},
        small=TUNE,
        makes=("runs/mine/model.safetensors",),
        slow=True,
    ),
    "llm2clip convert SOURCE DESTINATION": Run(
        needs=("openai/clip-vit-base-patch16",),
        meant={"SOURCE": "openai/clip-vit-base-patch16", "DESTINATION": "tower"},
        makes=("tower/model.safetensors",),
        prints="recognized: a plain vision tower",
    ),
    "make quickstart": NotRun(
        "eight minutes",
        run_by="tests/llm2clip/quickstart/test_real_weights.py::"
        "test_the_better_model_finds_unseen_concepts_by_their_names",
    ),
    'make quickstart ARGS="--profile study"': NotRun(
        "its parts are those of the tiny profile",
        run_by="tests/llm2clip/quickstart/test_pipeline.py::test_the_transfer_test_is_the_domain_that_training_lacks",
    ),
    'make quickstart ARGS="--profile full"': Run(
        needs=("Qwen/Qwen2.5-0.5B", "openai/clip-vit-base-patch16", "my_images", "full.yaml"),
        meant={"full": "full.yaml"},
        small="--llm Qwen/Qwen2.5-0.5B --vision-model openai/clip-vit-base-patch16 --data my_images "
        "--caption-columns short_caption long_caption --embedding-model none",
        makes=(f"{MODEL}/model.safetensors",),
        slow=True,
    ),
    "llm2clip evaluate MODEL --benchmark urban1k docci coco-karpathy --data ./data --output results/": NotRun(
        NO_SETS, run_by=MEASURED
    ),
    "llm2clip evaluate openai/clip-vit-large-patch14 --benchmark flickr30k": NotRun(NO_SETS, run_by=MEASURED),
    "llm2clip evaluate MODEL --benchmark docci --truncate-dim 128 --precision binary": NotRun(
        NO_SETS,
        run_by="tests/llm2clip/evaluation/test_evaluate.py::"
        "test_compact_embeddings_are_measured_as_a_database_compares_them",
    ),
    "llm2clip evaluate openai/clip-vit-base-patch32 runs/stage2 --benchmark ./my_pairs.csv docci --data DIR": NotRun(
        NO_SETS, run_by=MEASURED
    ),
    "make test": NotRun(CI),
    "make bench": NotRun("an hour of an idle machine", run_by="tests/benchmarks/test_contest.py"),
}
CONTRIBUTING = {
    "make study": NotRun("hours", run_by="tests/studies/test_tables.py"),
    "make lint": NotRun(CI),
    "make test-min": NotRun("gigabytes of the oldest libraries", run_by="tests/test_packaging.py"),
    "make audit": NotRun("it asks for advisories"),
    "make test-nightly": NotRun("many minutes", run_by="tests/processes/test_struck.py"),
    "make dist": NotRun("the repository is no stand-in", run_by="tests/test_packaging.py"),
    "make compat": NotRun(CI),
    "make format": NotRun("it rewrites the code; `make lint` runs the same tools"),
    "make bench-gpu": NotRun("there is no GPU"),
    "make test-cuda": NotRun("there is no GPU"),
    "make docs": NotRun(CI),
    "python -m llm2clip": NotRun(
        "it is a command only with the name of a job",
        run_by="tests/test_packaging.py::test_installed_command_shows_the_help_of_the_quickstart",
    ),
    ".ci/run": NotRun("it is what runs these tests"),
}
RELIABILITY = {
    "make test-faults": NotRun(".ci/run runs it", run_by="tests/faults/test_harness.py"),
    'make test-faults ARGS="--profile nightly"': NotRun("an hour", run_by="tests/faults/test_harness.py"),
    'make test-nightly ARGS="tests/processes"': NotRun("minutes", run_by="tests/processes/test_struck.py"),
    'make test-nightly ARGS="-rP tests/soak"': NotRun("minutes", run_by="tests/soak/test_soak.py"),
    "python -m tests.damaged --draws 1000": NotRun("ten minutes", run_by="tests/damaged/test_damaged.py"),
    "python -m tests.damaged --doors tables --first 536 --draws 1": NotRun(
        "a part of it", run_by="tests/damaged/test_damaged.py"
    ),
    'make test-faults ARGS="--record"': NotRun("it writes into docs", run_by="tests/faults/test_harness.py"),
}
SCALING = {
    "llm2clip plan stage1_paper --gpus 8 --gpu-memory 80 --model-name-or-path LLM2CLIP-Llama-3.1-8B-Instruct-CC "
    "--rows 12900000": Run(prints="parameters: 41.9M trained, 7,504.9M frozen", slow=True),
    "llm2clip plan embed_paper --rows 12873763 --text-model-name-or-path LLM2CLIP-Llama-3.1-8B-Instruct-CC": Run(
        prints="hours: 3.0 for 38,621,289 captions; 839 GFLOP each\ndisk: embeddings 317.0 GB"
    ),
    "llm2clip plan stage2_paper --rows 12873763 --max-steps -1 --num-train-epochs 4 --vision-model-name-or-path "
    "LLM2CLIP-EVA02-L-14-336 --text-model-name-or-path LLM2CLIP-Llama-3.1-8B-Instruct-CC": Run(
        prints="hours: 8.0 for 12,572 steps"
    ),
    "python -m benchmarks.scale": NotRun(
        "it writes into docs", run_by="tests/benchmarks/test_scale.py::test_the_page_contains_the_tables_of_the_record"
    ),
    "torchrun --nproc_per_node 8 -m llm2clip embed embed_paper": Run(
        needs=(TRAIN_LLM, "data/cc3m"),
        meant={"8": "2"},
        small=EMBED,
        makes=("runs/cache/0.emb.manifest",),
        prints="num_captions: ",
        slow=True,
    ),
    "llm2clip embed embed_paper --shard-slice 0/64": Run(
        needs=(TRAIN_LLM, "data/cc3m"), small=EMBED, makes=("runs/cache/0.emb.manifest",), prints="num_shards: 1"
    ),
    "llm2clip embed embed_paper --engine ray --ray-address auto": Run(
        needs=(TRAIN_LLM, "data/cc3m"),
        meant={"--ray-address auto": "--ray-actors 1"},
        small=EMBED,
        makes=("runs/cache/0.emb.manifest",),
        prints="num_captions: ",
        slow=True,
    ),
    "llm2clip verify runs/cache": Run(needs=(EMBED_CAPTIONS,), prints="num_captions: "),
    "torchrun --nproc_per_node 8 -m llm2clip stage2 stage2_paper": Run(
        needs=(EMBED_CAPTIONS, TOWER),
        meant={"8": "2"},
        small=STAGE2,
        makes=("runs/stage2/model.safetensors",),
        slow=True,
    ),
    "llm2clip stage2 stage2_paper": Run(
        needs=(EMBED_CAPTIONS, TOWER), small=STAGE2, makes=("runs/stage2/model.safetensors",), slow=True
    ),
    "torchrun --nnodes 8 --nproc_per_node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m llm2clip stage2 "
    "stage2_paper --per-device-train-batch-size 64": Run(
        needs=(EMBED_CAPTIONS, TOWER),
        meant={"--nnodes 8 --nproc_per_node 8": "--nnodes 1 --nproc_per_node 2", "HOST:29500": "localhost:0"},
        small=STAGE2,
        makes=("runs/stage2/model.safetensors",),
        slow=True,
    ),
    f"{LAUNCH}/ddp_8gpu.yaml -m llm2clip stage2 stage2_paper": Run(
        needs=(EMBED_CAPTIONS, TOWER, "training"),
        meant={"ddp_8gpu.yaml": "ddp_8gpu.yaml --num_processes 2 --cpu"},
        small=STAGE2,
        makes=("runs/stage2/model.safetensors",),
        slow=True,
    ),
    f"{LAUNCH}/deepspeed_zero2.yaml -m llm2clip stage2 stage2_paper": NotRun(
        "deepspeed is not among the packages of the tests",
        run_by="tests/llm2clip/trainers/test_divided.py"
        "::test_two_processes_with_a_part_of_the_model_each_equal_one_with_all_of_it",
    ),
    f"{LAUNCH}/fsdp.yaml -m llm2clip stage1 stage1_paper": NotRun(
        "FSDP needs GPUs",
        run_by="tests/llm2clip/trainers/test_divided.py"
        "::test_two_processes_with_a_part_of_the_model_each_equal_one_with_all_of_it",
    ),
    f"{LAUNCH}/cpu_2.yaml -m llm2clip stage2 RECIPE": Run(
        needs=(TRAIN_VISION, EMBED_MINE, "training"),
        meant={"RECIPE": "stage2_small_gpu"},
        small=TUNE,
        makes=("runs/mine/model.safetensors",),
        slow=True,
    ),
}
EXAMPLE = ("examples", MODEL)
EXAMPLES = {
    "jupyter lab examples/quickstart.ipynb": NotRun(
        "a page in the browser",
        run_by="tests/examples/test_notebook.py::test_the_notebook_runs_from_top_to_bottom",
    ),
    "python examples/zero_shot_classification.py": Run(EXAMPLE, prints="picture of: penguin"),
    "python examples/long_caption_retrieval.py": Run(EXAMPLE, prints="the first 77, ending in"),
    "llm2clip evaluate runs/quickstart/llm2clip --benchmark examples/benchmarks/concepts.py --data examples/data": Run(
        EXAMPLE, makes=("results/runs--quickstart--llm2clip.concepts.raw.json",), prints="Concepts"
    ),
    "python examples/fine_tune_on_a_folder.py --data my_pictures": Run(
        (*EXAMPLE, "my_pictures"), makes=("runs/fine_tuned/llm2clip/model.safetensors",)
    ),
    "python examples/swap_the_llm.py --llm Qwen/Qwen2.5-0.5B": Run(
        (*EXAMPLE, "Qwen/Qwen2.5-0.5B"), makes=("runs/other_llm/model.safetensors",)
    ),
    "python examples/swap_the_vision_tower.py --vision-model facebook/dinov2-small": Run(
        (*EXAMPLE, "facebook/dinov2-small"), makes=("runs/other_vision_tower/model.safetensors",)
    ),
    "python -m studies.miniature.questions questions": NotRun(
        "it draws 2,500 pictures", run_by="tests/studies/test_questions.py::test_the_files_have_pictures"
    ),
    "python examples/multimodal_llm.py": Run(
        (*EXAMPLE, "runs/quickstart/weights/smollm2-135m-instruct", "questions"),
        small="--steps 2",
        makes=("runs/multimodal_llm/model.safetensors", "runs/multimodal_llm/scores.json"),
        prints="% right",
    ),
    "python examples/push_to_the_hub.py --repo-id OWNER/NAME": Run(
        EXAMPLE, meant={"OWNER": "tester", "NAME": "example"}, makes=("tester/example",), prints="pushed: "
    ),
    "python examples/langchain_llamaindex.py": Run(EXAMPLE, prints="[a drawing of: monorail]"),
    "python examples/app.py": Run(EXAMPLE, serves=True, slow=True),
    "python examples/train_stage1.py": Run(EXAMPLE, makes=("runs/train_stage1/model.safetensors",)),
    "python examples/train_stage2.py": Run(EXAMPLE, makes=("runs/train_stage2/model.safetensors",)),
    "python examples/patch_features.py --image photo.jpg": Run(
        (*EXAMPLE, "photo.jpg"), makes=("patch_features.png",), prints="hidden_states[0]"
    ),
}
HUB_CONFIGS = {
    f"llm2clip convert microsoft/{name} {name}": Run(
        needs=(f"microsoft/{name}", *llm_of(model)),
        makes=(f"{name}/model.safetensors", f"{name}/README.md"),
        prints="missing: none",
        # The shapes are those of the real one.
        slow=model.is_joint,
    )
    for name, model in published_models().items()
    if model.checkpoint is not None
}
NO_PROMPT = ' --prompt-prefix "" --prompt-suffix ""'
for name, llm, options in (
    ("LLM2CLIP-Llama-3.1-8B-Instruct-CC", LLAMA, ""),
    ("LLM2CLIP-Qwen2.5-0.5B-CC", "Qwen/Qwen2.5-0.5B", NO_PROMPT),
    ("LLM2CLIP-SmolLM2-135M-CC", "HuggingFaceTB/SmolLM2-135M-Instruct", NO_PROMPT),
):
    HUB_CONFIGS[f"llm2clip stage1 stage1_paper --model-name-or-path {llm}{options}"] = Run(
        needs=(llm, *PAIRS), small=STAGE1, makes=("runs/stage1/model.safetensors",), check=partial(same_prompt, name)
    )
SERVED = "tests/llm2clip/serving/test_serve.py::test_the_page_of_the_documents_runs_against_the_command"
SERVE = {
    f"llm2clip serve {MODEL}": NotRun("it serves until it is stopped", run_by=SERVED),
    f"llm2clip serve {MODEL} --index runs/index/concepts": NotRun(
        "it serves until it is stopped",
        run_by="tests/llm2clip/serving/test_endpoints.py::test_search_finds_what_the_index_finds",
    ),
    f"llm2clip serve {MODEL} --host 0.0.0.0 --token-env LLM2CLIP_TOKEN": NotRun(
        "it serves until it is stopped",
        run_by="tests/llm2clip/serving/test_serve.py::"
        "test_sigterm_finishes_what_was_accepted_and_ends_without_an_error",
    ),
}
SPACE = {
    "llm2clip demo --model OWNER/NAME --write-space FOLDER": Run(
        meant={"OWNER": "tester", "NAME": "model", "FOLDER": "space"}, makes=("space/app.py",)
    ),
}
DISTILLED = (
    f"llm2clip distill-text runs/quickstart/llm2clip --student {MINILM} "
    "--sources '[{path: examples/data/concepts, caption_columns: [caption, keywords]}, "
    "{path: examples/data/glosses, caption_columns: [lemmas, gloss]}]' "
    "--eval-sources '{test: {path: examples/data/concepts, split: test, caption_columns: [caption, caption_de]}}' "
    "--output-dir runs/student --into runs/quickstart/llm2clip"
)
DISTILL = {
    DISTILLED: Run(
        needs=(INDEX, MINILM),
        small=f"{CPU} --sources '[{{path: examples/data/concepts, split: validation}}]'",
        makes=("runs/student/2_Dense/model.safetensors", f"{MODEL}/query_encoder/modules.json"),
        prints="test_caption_de",
    ),
    'llm2clip search runs/index/concepts "someone riding a bicycle" --fast': Run(
        needs=(DISTILLED,), small=f"--model {MODEL}"
    ),
}
MODELS = {
    'llm2clip embed --text-model-name-or-path intfloat/multilingual-e5-small --prompt-prefix "query: " '
    "--sources '[{path: ./my_images, caption_columns: [caption]}]' --output-dir runs/cache": Run(
        needs=(E5, "my_images"), makes=("runs/cache/index.manifest",), prints="num_captions: "
    ),
}
JOINT_1B, JOINT_8B = "LLM2CLIP-Llama3.2-1B-EVA02-L-14-336", "LLM2CLIP-Openai-L-14-336"
# A small model of ours stands for a converted checkpoint, and contains its LLM.
CONVERTED = dict.fromkeys((JOINT_1B, JOINT_8B, LLM_1B), MODEL)
INDEX_PHOTOS = f"llm2clip index my_photos --model {JOINT_1B}"
EMBED_PAIRS = (
    f"llm2clip embed --text-model-name-or-path {LLM_1B} --dtype bfloat16 --output-dir runs/mine_cache "
    "--sources '[{path: data/mine, split: train+validation, caption_columns: [caption]}]'"
)
ADAPT = f"llm2clip stage2 stage2_small_gpu --model-name-or-path {JOINT_1B} --bf16 true"
BUILD_MINE = "llm2clip build runs/mine Llama-mine"
SHARDS = "llm2clip check-data 'data/cc3m/*.tar' --streaming --caption-columns"
DOWNLOADS = "a tool that is not ours asks the Hub or downloads"
START = {
    **{
        f"llm2clip convert microsoft/{joint} {joint} --text-model {llm}": Run(
            needs=(f"microsoft/{joint}", llm),
            makes=(f"{joint}/model.safetensors",),
            prints="missing: none",
            slow=True,
        )
        for joint, llm in ((JOINT_1B, LLM_1B), (JOINT_8B, LLM_8B))
    },
    INDEX_PHOTOS: Run(
        needs=(MODEL, "my_photos"), meant=CONVERTED, makes=("runs/index/my_photos",), prints="embedded: 8"
    ),
    'llm2clip search runs/index/my_photos "ein Hund am Strand" "Sonnenuntergang in den Bergen" '
    "--top 6 --html results.html": Run(needs=(INDEX_PHOTOS,), makes=("results.html",), prints="ein Hund am Strand\t"),
    "llm2clip search runs/index/my_photos --image photo.jpg": Run(
        needs=(INDEX_PHOTOS, "photo.jpg"), prints="my_photos/"
    ),
    f"llm2clip index my_photos --model {JOINT_8B}": Run(
        needs=(MODEL, "my_photos"), meant=CONVERTED, makes=("runs/index/my_photos",), prints="embedded: 8"
    ),
    'llm2clip search runs/index/my_photos "ein Hund am Strand"': Run(needs=(INDEX_PHOTOS,), prints="my_photos/"),
    f"llm2clip evaluate {JOINT_8B} --benchmark ./my_images --caption-columns caption --dtype bfloat16": Run(
        needs=(MODEL, "my_images"), meant=CONVERTED, prints="T2I R@1 / 5 / 10"
    ),
    f"llm2clip evaluate {JOINT_8B} --benchmark flickr30k urban1k --data ./data --dtype bfloat16": NotRun(
        NO_SETS, run_by=MEASURED
    ),
    "llm2clip check-data data/mine --split train --caption-columns caption": Run(
        needs=("data/mine",), prints="24, of which 24 can be used"
    ),
    f"llm2clip plan stage2_small_gpu --gpus 1 --gpu-memory 24 --peak-tflops 125 --rows 20000 --bf16 true "
    f"--model-name-or-path {JOINT_1B}": Run(
        prints="hours: 0.5 for 625 steps of 80,000 rows; 1,058 GFLOP each\n"
        "disk: checkpoint 3.3 GB, 2 kept: 6.6 GB; result 1.5 GB; frozen states 23.6 GB"
    ),
    EMBED_PAIRS: Run(
        needs=(MODEL, "data/mine"), meant=CONVERTED, makes=("runs/mine_cache/index.manifest",), prints="num_captions: "
    ),
    ADAPT: Run(needs=(EMBED_PAIRS,), meant=CONVERTED, small=TUNE, makes=("runs/mine/model.safetensors",)),
    f"llm2clip evaluate {JOINT_1B} runs/mine --benchmark data/mine --split validation --caption-columns caption "
    "--embedding-cache runs/mine_cache": Run(needs=(ADAPT,), meant=CONVERTED, prints="runs/mine, data/mine"),
    BUILD_MINE: Run(needs=(ADAPT,), makes=("Llama-mine/model.safetensors",)),
    "llm2clip push Llama-mine OWNER/Llama-mine --dry-run": Run(
        needs=(BUILD_MINE,), meant={"OWNER": "tester"}, small="--no-check", prints="would_upload_to: tester/Llama-mine"
    ),
    "hf auth login": NotRun(DOWNLOADS),
    "hf download OWNER/Llama-my-model --local-dir download": NotRun(DOWNLOADS),
    "hf download QuanSun/EVA-CLIP EVA02_CLIP_L_psz14_s4B.pt --local-dir .": NotRun(DOWNLOADS),
    "hf download qidouxiong619/dreamlip_long_captions --repo-type dataset --local-dir data/dreamlip": NotRun(
        DOWNLOADS
    ),
    "img2dataset --url_list data/dreamlip/cc3m_3long_3short_1raw_captions_url.csv --input_format csv "
    "--url_col 'Image Path' "
    '--save_additional_columns \'["raw_caption","shortSV_captions","longSV_captions"]\' '
    "--output_format webdataset --output_folder data/cc3m --resize_mode keep_ratio --image_size 384 "
    "--processes_count 16 --thread_count 64": NotRun(DOWNLOADS),
    f"{SHARDS} json.raw_caption json.shortSV_captions json.longSV_captions": Run(
        needs=("data/cc3m",), prints="24, of which 24 can be used"
    ),
    "torchrun --nproc_per_node 8 -m llm2clip stage1 stage1_paper --per-device-train-batch-size 256 "
    "--tower-chunk-size 64": Run(
        needs=(LLAMA, *PAIRS),
        meant={"8": "2"},
        small=f"{STAGE1} --per-device-train-batch-size 2 --tower-chunk-size 1",
        makes=("runs/stage1/model.safetensors",),
        slow=True,
    ),
    "llm2clip convert EVA02_CLIP_L_psz14_s4B.pt EVA02-CLIP-L-14": Run(
        needs=("EVA02_CLIP_L_psz14_s4B.pt",),
        makes=("EVA02-CLIP-L-14/model.safetensors",),
        prints="recognized: a plain vision tower",
        slow=True,
    ),
    "llm2clip plan stage2_table1_eva02_l14 --vision-model-name-or-path LLM2CLIP-EVA02-L-14-224 "
    "--text-model-name-or-path LLM2CLIP-Llama-3.1-8B-Instruct-CC": Run(prints="hours: 0.7 for 2,804 steps"),
    "torchrun --nproc_per_node 8 -m llm2clip stage2 stage2_table1_eva02_l14": Run(
        needs=(EMBED_CAPTIONS, "EVA02-CLIP-L-14"),
        meant={"8": "2"},
        small=STAGE2,
        makes=("runs/stage2/model.safetensors",),
        slow=True,
    ),
    "llm2clip evaluate open_clip:EVA02-L-14/merged2b_s4b_b131k --benchmark flickr30k --data ./data": NotRun(
        NO_SETS, run_by=MEASURED
    ),
    "llm2clip evaluate runs/stage2 --benchmark flickr30k coco-salesforce sharegpt4v-1k urban1k docci --data ./data "
    "--dtype bfloat16": NotRun(NO_SETS, run_by=MEASURED),
}
COMMANDS: dict[str, Run | NotRun] = {
    **README, **CONTRIBUTING, **SCALING, **DISTILL, **EXAMPLES, **HUB_CONFIGS, **MODELS, **SPACE, **SERVE,
    **RELIABILITY, **START,
}  # fmt: skip
