"""A BERT encoder of a few thousand weights drawn at random, in the files of a sentence-transformers folder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

TITLES = "a b c comedy drama heat of story the toy war . ,"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TITLES.split()]
WIDTH, INNER, LAYERS = 12, 20, 2
SETTINGS = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": WIDTH,
    "num_attention_heads": 3,
    "num_hidden_layers": LAYERS,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def _weights():
    draw = torch.Generator().manual_seed(0)
    shapes = {"embeddings.word_embeddings": (len(WORDS), WIDTH), "embeddings.position_embeddings": (16, WIDTH)}
    shapes |= {"embeddings.token_type_embeddings": (2, WIDTH)}
    norms = ["embeddings.LayerNorm"]
    for layer in (f"encoder.layer.{number}" for number in range(LAYERS)):
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        shapes |= {f"{layer}.{name}": (WIDTH, WIDTH) for name in square}
        shapes |= {f"{layer}.intermediate.dense": (INNER, WIDTH), f"{layer}.output.dense": (WIDTH, INNER)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    found = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    found |= {
        f"{name}.bias": torch.randn(shape[0], generator=draw)
        for name, shape in shapes.items()
        if "dense" in name or "self" in name
    }
    found |= {f"{name}.{part}": torch.randn(WIDTH, generator=draw) for name in norms for part in ("weight", "bias")}
    return found


@pytest.fixture
def tiny_bert(tmp_path):
    """Its folder, `tiny`, with a model card and mean pooling."""
    folder = tmp_path / "tiny"
    (folder / "1_Pooling").mkdir(parents=True)
    save_file({f"bert.{name}": value for name, value in _weights().items()}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(length=16)  # As published ones have it; ours pads to the longest.
    tokenizer.save(str(folder / "tokenizer.json"))
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    written = {"config.json": SETTINGS, "modules.json": modules, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}
    for name, value in written.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Tiny\n")
    return folder


@pytest.fixture
def change(tiny_bert):
    """Change a JSON file of it."""

    def write(name, **values):
        path = tiny_bert / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write
