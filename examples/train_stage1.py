"""Train a text tower on pairs of captions of one picture, from any torch data set (here: a list of dicts).

python examples/train_stage1.py
"""

from common import example_parser, parse, pictures
from transformers import AutoTokenizer

from llm2clip import LLM2CLIPTextModel, Stage1Config, Stage1Trainer


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--output-dir", default="runs/train_stage1", help="(%(default)s)")
    arguments = parse(parser)
    model = LLM2CLIPTextModel.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, test = (
        [{"anchor": row["caption"], "positive": row["keywords"]} for row in pictures(split).remove_columns("image")]
        for split in ("train", "test")
    )
    args = Stage1Config(
        output_dir=arguments.output_dir,
        max_steps=10,
        per_device_train_batch_size=16,
        warmup_steps=0,
        lora_target_modules=["all-linear"],  # in any text model; the default is for Llama and its kind
    )
    trainer = Stage1Trainer(model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


main()
