"""Train the tokenizer, then ground the text encoder in pictures, on text alone as input.

From a caption the encoder predicts the picture's 16×16 thumbnail, its object and its style. This gives
word embeddings that mean something before the U-Net is trained on them; contrastive training of the same
length did not. Held-out objects and styles are left out: their words keep their initial embeddings.
"""
import random

import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from harness.testbed import captions, training, vocabulary
from harness.testbed.sources import STYLES
from harness.testbed.train_vae import learned_rows

WIDTH = 128
THUMBNAIL = 16


def make_text_encoder(tokens: int) -> CLIPTextModel:
    """Four layers of width 128 over at most 16 tokens; about 0.75 M parameters."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=tokens, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=vocabulary.LENGTH, projection_dim=WIDTH,
        hidden_act="quick_gelu", pad_token_id=tokens - 1, bos_token_id=tokens - 2, eos_token_id=tokens - 1))


class Grounding(torch.nn.Module):
    """Heads from the mean token state (N, 128) to thumbnail (N, 768), object and style logits."""

    def __init__(self, objects: int, styles: int) -> None:
        super().__init__()
        self.thumbnail = torch.nn.Sequential(torch.nn.Linear(WIDTH, 512), torch.nn.GELU(),
                                             torch.nn.Linear(512, 3 * THUMBNAIL ** 2))
        self.object = torch.nn.Linear(WIDTH, objects)
        self.style = torch.nn.Linear(WIDTH, styles)


def main() -> None:
    """Command line entry."""
    options = training.parser(__doc__.splitlines()[0], steps=1000, batch=128, rate=2e-3).parse_args()
    device = training.setup(options.threads)
    pixels, records, objects = training.load_images(options.work)
    tokenizer = vocabulary.train([entry["label"] for entry in objects.values()])
    vocabulary.save(tokenizer, options.work / "generator" / "tokenizer")
    curated, every = learned_rows(records)
    thumbnails = F.avg_pool2d(training.to_tensor(pixels), 64 // THUMBNAIL).flatten(1)
    slugs = {slug: number for number, slug in enumerate(objects)}
    words = {source.style: number for number, source in enumerate(STYLES)}
    encoder = make_text_encoder(len(tokenizer)).to(device)
    heads = Grounding(len(slugs), len(words)).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=1e-2)
    checkpoint = training.Checkpoint(options.work / "text_encoder.ckpt", options.save_minutes,
                                     {"model": encoder, "heads": heads, "optimizer": optimizer})
    start = checkpoint.load()
    source = random.Random(training.SEED + start)
    report = training.Report(100, options.steps)
    # Texts that name both, so that both can be asked for.
    full = [text for text in captions.VARIANTS if "{label}" in text[1] and "{style}" in text[1]]
    for step in range(start, options.steps):
        rows = torch.cat([training.batches(curated, options.batch // 2),
                          training.batches(every, options.batch // 2)])
        chosen = [records[row] for row in rows.tolist()]
        texts = [source.choice(full)[1].format(label=objects[record["object"]]["label"],
                                               style=record["style"]).lower() for record in chosen]
        tokens = vocabulary.encode(tokenizer, texts).to(device)
        target = thumbnails[rows].to(device)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, options.steps, options.rate)
        with training.precision(device):
            state = encoder(tokens).last_hidden_state.mean(1)
            picture = heads.thumbnail(state)
            object_logits, style_logits = heads.object(state), heads.style(state)
        picture_error = (picture.float() - target).square().mean()
        object_error = F.cross_entropy(object_logits.float(),
                                       torch.tensor([slugs[r["object"]] for r in chosen]).to(device))
        style_error = F.cross_entropy(style_logits.float(),
                                      torch.tensor([words[r["style"]] for r in chosen]).to(device))
        (5 * picture_error + 0.2 * object_error + 0.2 * style_error).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report.add(step, picture=picture_error.detach(), object=object_error.detach(),
                   style=style_error.detach())
        checkpoint.save(step + 1)
    checkpoint.save(options.steps, force=True)
    encoder.save_pretrained(options.work / "grounded_text_encoder")


if __name__ == "__main__":
    main()
