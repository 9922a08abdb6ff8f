"""Train a small, true OPT language model from scratch on a CPU, and save it as a Transformers checkpoint.

The two checkpoints in ``examples/models`` come from it (their model cards tell the exact runs):

    python examples/train_small_opt.py --minutes 40                      # examples/models/opt-austen
    python examples/train_small_opt.py --size draft --minutes 5          # examples/models/opt-austen-draft
    python examples/train_small_opt.py --evaluate examples/models/opt-austen

The text is Jane Austen's six novels (public domain), read from the Debian package ``r-cran-janeaustenr``; that needs
``apt-get``, ``dpkg-deb`` and ``pip install rdata``. With ``--text FILE...`` any plain text takes its place, and then
only torch and transformers are needed.

What makes the result an OPT rather than "some GPT": pre-layer-norm blocks with ReLU, learned positions (offset by 2),
a head tied to the embeddings, and OPT's tokenizer convention - byte-level BPE in which ``</s>`` (2) begins every text
as well as ending it and ``<pad>`` is 1. So every chapter is trained on as ``</s> text </s>``.
"""

import argparse
import copy
import math
import re
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GenerationConfig, GPT2TokenizerFast, OPTConfig, OPTForCausalLM


MODELS = Path("examples/models")
PACKAGE = "r-cran-janeaustenr"
PAD, EOS = 1, 2  # OPT's ids; "</s>" is bos, eos and unk at once
CONTEXT = 512  # max_position_embeddings, and the length of every training window: no position is left untrained
SIZES = {  # head counts divide by 4, so that the models can be split over 2 or 4 cores
    "main": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 1024},
    "draft": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 512},
}
PROMPTS = ("Emma was", '"I am sorry to hear it," said', "The letter which Elizabeth received the next morning")
HEADING = re.compile(r"\s*chapter\s+([ivxlc]+|\d+)\.?\s*", re.IGNORECASE)
CLOSING = re.compile(r"\s*(finis|the end|a note on the text|volume [ivx]+)\.?\s*", re.IGNORECASE)


def read_austen():
    """Download the Debian package and return the lines of each novel, one list per novel."""
    import rdata

    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["apt-get", "download", PACKAGE], cwd=tmp, check=True, capture_output=True)
        subprocess.run(["dpkg-deb", "-x", next(Path(tmp).glob("*.deb")), tmp], check=True)
        data = Path(tmp, "usr/lib/R/site-library/janeaustenr/data")
        index, blob = rdata.read_rds(data / "Rdata.rdx"), (data / "Rdata.rdb").read_bytes()
    novels = []
    for start, size in index["variables"].values():  # each: 4 bytes of length, then a zlib-compressed R vector
        vector = rdata.parser.parse_data(zlib.decompress(blob[start + 4 : start + size]), extension=".rds")
        novels.append([str(line) for line in rdata.conversion.convert(vector)])
    return novels


def to_chapters(lines):
    """Reflow a book into chapters of one-line paragraphs; without chapter headings it counts as one chapter.

    Headings, title pages, ornaments, footnotes and the underscores that mark italics are dropped.
    """
    chapters, inside = [[[]]], not any(HEADING.fullmatch(line) for line in lines)
    for line in lines:
        if HEADING.fullmatch(line):
            chapters.append([[]])
            inside = True
        elif CLOSING.fullmatch(line):
            inside = False
        elif inside and line.strip():
            chapters[-1][-1].append(line)
        else:
            chapters[-1].append([])
    chapters = [[" ".join(" ".join(p).replace("_", "").split()) for p in chapter] for chapter in chapters]
    chapters = [[p for p in chapter if p and not p.startswith("*")] for chapter in chapters]
    return [chapter for chapter in chapters if chapter]


def split(books, parts=(("train", 0.93), ("validation", 0.95), ("test", 1.0))):
    """Cut every book into contiguous spans: the first 93 % to train on, 2 % to pick the checkpoint, 5 % to report on.

    Returns ``{part: [document, ...]}``; a document is a chapter, or the piece of one that lies in the part.
    """
    result = {name: [] for name, _ in parts}
    for chapters in books:
        total, seen = sum(len(p) for chapter in chapters for p in chapter), 0
        for chapter in chapters:
            pieces = {}
            for paragraph in chapter:
                part = next(name for name, end in parts if seen / total < end)
                pieces.setdefault(part, []).append(paragraph)
                seen += len(paragraph)
            for part, paragraphs in pieces.items():
                result[part].append("\n".join(paragraphs))
    return result


def train_tokenizer(documents, vocab_size):
    """A byte-level BPE with OPT's special tokens, as the class OPT itself uses."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    with tempfile.TemporaryDirectory() as tmp:
        vocab, merges = bpe.save_model(tmp)
        special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
        return GPT2TokenizerFast(vocab, merges, add_bos_token=True, model_max_length=CONTEXT, **special)


def encode(tokenizer, documents):
    """All documents as one stream, ``</s> first </s> second </s> ... </s>``: each begins and ends with ``</s>``."""
    ids = [tokenizer(document, verbose=False).input_ids for document in documents]  # the tokenizer adds the bos
    return np.array([i for document in ids for i in document] + [EOS])


def epoch_windows(stream, newline, rng):
    """One pass over the stream in shuffled windows of CONTEXT + 1 tokens (inputs and the targets one to the right).

    Three in four are moved to the nearest start of a paragraph and given a leading ``</s>``, which is how prompts
    will look; the rest start anywhere, so that long paragraphs are covered as well.
    """
    paragraphs = np.flatnonzero(stream == newline) + 1
    last = len(stream) - CONTEXT - 1
    starts = np.arange(rng.integers(CONTEXT), last, CONTEXT)
    for start in rng.permutation(starts):
        if rng.random() < 0.75 and len(paragraphs):
            start = min(paragraphs[np.abs(paragraphs - start).argmin()], last)
            yield np.concatenate([[EOS], stream[start : start + CONTEXT]])
        else:
            yield stream[start : start + CONTEXT + 1]


def loss_of(model, inputs, targets, reduction="mean"):
    """Cross-entropy with explicit targets: `labels=` would drop the last position, leaving its embedding untrained."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(model, tokenizer, documents):
    """Perplexity of a text, read in blocks of CONTEXT tokens that each start afresh from ``</s>``."""
    model.eval()
    targets = torch.from_numpy(encode(tokenizer, documents)[1:])
    total = 0.0
    for block in targets.split(CONTEXT):
        inputs = torch.cat([torch.tensor([EOS]), block[:-1]])
        total += loss_of(model, inputs[None], block[None], "sum").item()
    words, size = sum(len(d.split()) for d in documents), sum(len(d.encode()) for d in documents)
    found = {"perplexity": math.exp(total / len(targets)), "word_perplexity": math.exp(total / words)}
    found["bits_per_byte"] = total / math.log(2) / size
    return {**found, "tokens": len(targets), "words": words, "bytes": size}


def save(model, tokenizer, out):
    """Write the checkpoint, its weights in float16."""
    tokenizer.save_pretrained(out)
    copy.deepcopy(model).half().save_pretrained(out)


def train(model, tokenizer, parts, args, out):
    """AdamW with warm-up and a cosine to zero, until `--epochs` or `--minutes` end; saves the best on validation."""
    rng = np.random.default_rng(args.seed)
    stream = encode(tokenizer, parts["train"])
    newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": args.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=args.lr, betas=(0.9, 0.99), fused=True)

    steps = int(args.epochs * (len(stream) // CONTEXT - 1) / args.batch_size)
    print(f"{model.num_parameters()} parameters, {len(stream)} training tokens, at most {steps} steps", flush=True)
    windows, step, progress, start, best = iter(()), 0, 0.0, time.time(), {"perplexity": math.inf}
    while progress < 1.0:
        batch = []
        while len(batch) < args.batch_size:
            if (window := next(windows, None)) is None:
                windows = epoch_windows(stream, newline, rng)
            else:
                batch.append(window)
        batch = torch.from_numpy(np.stack(batch))
        step += 1
        progress = max(step / steps, (time.time() - start) / 60 / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / args.warmup, 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(model, batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.eval_every == 0 or progress >= 1.0:
            seconds, seen = time.time() - start, step * args.batch_size * CONTEXT
            found = evaluate(model, tokenizer, parts["validation"])["perplexity"]
            if found < best["perplexity"]:
                best = {"perplexity": found, "best_step": step}
                save(model, tokenizer, out)
            line = f"step {step:5d}  {seconds:5.0f} s  {seen / seconds:6.0f} tokens/s  epoch {seen / len(stream):5.2f}"
            print(f"{line}  loss {loss.item():.3f}  validation perplexity {found:.2f}", flush=True)
    return {**best, "steps": step, "seconds": seconds, "tokens": seen, "stream": len(stream)}


def sample(model, tokenizer, prompt, seed=0):
    """A continuation of a prompt, drawn at temperature 0.8 from the most likely 95 %."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.8, top_p=0.95)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def write_card(out, args, model, tokenizer, run, test):
    """The model card. Its numbers are of the saved float16 weights, read back and computed in float32."""
    c = model.config
    texts = f"Jane Austen's six novels (public domain), from the Debian package `{PACKAGE}`"
    texts = ", ".join(Path(f).name for f in args.text) if args.text else texts
    shown = "\n\n".join("> " + sample(model, tokenizer, p).replace("\n", "\n>\n> ") for p in PROMPTS[:2])
    card = f"""---
{{language: en, license: apache-2.0, library_name: transformers, pipeline_tag: text-generation}}
---
# {out.name}

A small OPT language model (`transformers.OPTForCausalLM`), trained from scratch on a CPU by
`examples/train_small_opt.py`. It exists to try out and test OPT code with something that writes English.

- **Model**: {model.num_parameters():,} parameters; {c.num_hidden_layers} pre-layer-norm layers of width \
{c.hidden_size}, {c.num_attention_heads} heads, feed-forward {c.ffn_dim}, ReLU, {c.max_position_embeddings} \
positions, tied head, vocabulary {c.vocab_size}; float16.
- **Tokenizer**: byte-level BPE in OPT's convention: `</s>` (2) begins every text and ends a chapter, `<pad>` is 1.
  One paragraph is one line.
- **Texts**: {texts}. Headings, notes and italics marks are dropped. The first 93 % of each book are trained on, the
  next 2 % choose the checkpoint and the last 5 % are the test part below.
- **Licence**: Apache-2.0 for the weights and tokenizer{"" if args.text else "; the texts are in the public domain"}.

## Training

    python {" ".join(sys.argv)}

{run["steps"]} steps of {args.batch_size} windows of {CONTEXT} tokens ({run["tokens"]:,} tokens, \
{run["tokens"] / run["stream"]:.1f} passes over {run["stream"]:,}) in {run["seconds"] / 60:.1f} minutes on \
{torch.get_num_threads()} CPU threads, {"bfloat16 autocast" if args.bf16 else "float32"}; AdamW, learning rate \
{args.lr:g} (warm-up of {args.warmup} steps, then a cosine to 0), betas 0.9 and 0.99, weight decay \
{args.weight_decay:g}, gradient norm at most 1, dropout {c.dropout:g} (none in attention), seed {args.seed}. \
With `--minutes` the schedule follows the clock, so another machine gets another number of steps. \
Best of the validation part: step {run["best_step"]}, perplexity {run["perplexity"]:.2f}.

## Held-out perplexity

| per token | per word | bits per byte | test part |
|---|---|---|---|
| {test["perplexity"]:.2f} | {test["word_perplexity"]:.1f} | {test["bits_per_byte"]:.3f} | {test["tokens"]:,} tokens, \
{test["words"]:,} words, {test["bytes"]:,} bytes |

In blocks of {CONTEXT} tokens that each start afresh from `</s>`; `--evaluate` computes it again.

## Samples
Temperature 0.8, top-p 0.95, seed 0, 120 new tokens, not chosen among several:

{shown}

## Limits
It knows these texts and nothing else: no facts, no instructions, no other style, with the views of their time.
The words are right more often than the sentences, the sense drifts, and greedy decoding falls into loops.
"""
    (out / "README.md").write_text(card)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--evaluate", metavar="DIR", help="train nothing: print the held-out perplexity of this checkpoint")
    add("--text", nargs="+", metavar="FILE", help="plain text files to use instead of the Austen novels")
    add("--size", choices=SIZES, default="main", help="'draft' is small enough to draft tokens for 'main' to check")
    add("--tokenizer", metavar="DIR", help="use this one, not a new one (the draft takes opt-austen's)")
    add("--init", metavar="DIR", help="start from the weights of this checkpoint of the same --size")
    add("--out", type=Path, help="where the checkpoint goes (default: under examples/models)")
    add("--vocab-size", type=int, default=3072, help="more makes texts shorter but the embedding larger")
    add("--epochs", type=float, default=12, help="passes over the text; small texts overfit beyond some ten")
    add("--minutes", type=float, default=math.inf, help="time limit; the learning rate reaches 0 when it runs out")
    add("--batch-size", type=int, default=2, help=f"windows of {CONTEXT} tokens per step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--warmup", type=int, default=100, help="steps until the peak")
    add("--weight-decay", type=float, default=0.1, help="on matrices and embeddings only")
    add("--dropout", type=float, default=0.1, help="on the outputs of attention and feed-forward")
    add("--bf16", action="store_true", help="bfloat16 autocast; faster only where the CPU has instructions for it")
    add("--eval-every", type=int, default=400, help="steps between looks at the validation part")
    add("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    books = [Path(f).read_text().splitlines() for f in args.text] if args.text else read_austen()
    parts = split([to_chapters(lines) for lines in books])
    if not all(parts.values()) or sum(map(len, parts["train"])) < 20 * CONTEXT:
        parser.error("that is too little text to train on")
    if args.evaluate:
        model, tokenizer = OPTForCausalLM.from_pretrained(args.evaluate), AutoTokenizer.from_pretrained(args.evaluate)
        print(evaluate(model, tokenizer, parts["test"]))
        return

    out = args.out or MODELS / ("opt-austen" if args.size == "main" else "opt-austen-draft")
    shared = args.tokenizer or (MODELS / "opt-austen" if args.size == "draft" and not args.text else None)
    tokenizer = AutoTokenizer.from_pretrained(shared) if shared else train_tokenizer(parts["train"], args.vocab_size)
    shape = {**SIZES[args.size], "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    shape.update(word_embed_proj_dim=shape["hidden_size"], dropout=args.dropout, attention_dropout=0.0)
    ids = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    model = OPTForCausalLM(OPTConfig(**shape, **ids))  # OPTConfig's own defaults: pre-layer-norm, ReLU, tied head
    if args.init:
        model.load_state_dict(OPTForCausalLM.from_pretrained(args.init).state_dict())
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    run = train(model, tokenizer, parts, args, out)
    model, tokenizer = OPTForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    test = evaluate(model, tokenizer, parts["test"])
    write_card(out, args, model, tokenizer, run, test)
    print(test)
    for prompt in PROMPTS:
        print("---", sample(model, tokenizer, prompt), sep="\n")


if __name__ == "__main__":
    main()
