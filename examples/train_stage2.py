"""Train a model on captioned pictures, from any torch data set (here: a list of dicts).

python examples/train_stage2.py
"""

from common import example_parser, parse, pictures
from transformers import AutoProcessor

from llm2clip import LLM2CLIPModel, Stage2Config, Stage2Trainer


def main() -> None:
    parser = example_parser(__doc__)
    parser.add_argument("--output-dir", default="runs/train_stage2", help="(%(default)s)")
    arguments = parse(parser)
    model = LLM2CLIPModel.from_pretrained(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    data = pictures("test")
    embeds = model.text_model.encode(data["caption"], processor.tokenizer)
    rows = [{"image": image, "llm_embeds": row} for image, row in zip(data["image"], embeds, strict=True)]
    args = Stage2Config(output_dir=arguments.output_dir, max_steps=10, per_device_train_batch_size=16)
    trainer = Stage2Trainer(model, args, train_dataset=rows[64:], eval_dataset=rows[:64], processing_class=processor)
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()


main()
