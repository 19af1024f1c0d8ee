"""The tokenizer that generator and CLIP evaluator use: byte-pair encoding over captions, length 16."""
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from harness.testbed import captions
from harness.testbed.sources import STYLES

LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train(labels: list[str], size: int = 1700) -> CLIPTokenizer:
    """Tokenizer trained on every caption of every label; the end token has the greatest id."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = BpeTrainer(vocab_size=size - 2, end_of_word_suffix="</w>", show_progress=False,
                         initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = [text for label in labels for text in captions.variants(label, "x")]
    texts += [captions.caption("x", source.style) for source in STYLES for _ in range(len(labels))]
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    vocabulary[START], vocabulary[END] = len(vocabulary), len(vocabulary) + 1
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save to a folder that ``CLIPTokenizer`` and ``AutoTokenizer`` load."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "bos_token": START,
              "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in parsed["merges"])
    (folder / "vocab.json").write_text(json.dumps(parsed["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def encode(tokenizer: CLIPTokenizer, texts: list[str]):
    """Token ids int64 (N, 16), padded and cut."""
    return tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True,
                     return_tensors="pt").input_ids
