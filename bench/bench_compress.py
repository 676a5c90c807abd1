# SPDX-License-Identifier: Apache-2.0
"""Compression of the all-MiniLM-L6-v2 sentence encoder: what each step of sm.compress gives.

python bench/bench_compress.py [--keep 0.8 0.6 0.5 0.4] [--sequential] [--tiny] [--json FILE]
Calibration: 350 docstrings and their first paragraphs, about 42,000 tokens. Held out: 1,000 pairs.
cosine, p5: to the original's embeddings, mean and 5th percentile. recall: of the own document.
"""

import os
import sys

from harness import parser, start, write

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SETTINGS = [
    {"method": "svd"},
    {"method": "fisher"},
    {"method": "whitened"},
    {"method": "whitened", "ranks": "global"},
]
SEQUENTIAL = [
    {"method": "whitened", "sequential": True},
    {"method": "whitened", "ranks": "global", "sequential": True},
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4])
    options.add_argument("--sequential", action="store_true", help="the slow second pass too")
    args = options.parse_args()
    start(args)
    try:
        from structmat.demo import data, encoder
        from structmat.demo.run import contrastive_loss

        encoder.model_folder()
        import transformers  # noqa: F401
    except (ImportError, ValueError) as missing:
        print(f"skipped: {missing}")
        sys.exit(77)
    import structmat as sm

    held_out, calibration = (20, 10) if args.tiny else (1000, 350)
    pairs = data.docstring_pairs(seed=0, limit=60 if args.tiny else 4000)
    texts = sorted((text for p in pairs[-calibration:] for text in p), key=len)
    queries = [query for query, _ in pairs[:held_out]]
    documents = [document for _, document in pairs[:held_out]]
    model, tokenizer = encoder.load_encoder(args.device)
    batches = encoder.tokenize(tokenizer, texts, device=args.device)
    paired = [  # for a loss without labels: each query's own document against the others'
        encoder.tokenize(tokenizer, [q for q, _ in p] + [d for _, d in p], device=args.device)[0]
        for p in (pairs[-calibration:][i : i + 16] for i in range(0, calibration, 16))
    ]
    reference = encoder.embed(model, tokenizer, queries + documents)
    recall = encoder.retrieval(reference[:held_out], reference[held_out:])
    rows = [{"setting": "original", "keep": 1.0, "recall@1": recall[0], "recall@10": recall[1]}]
    print("  ".join(f"{key}: {value}" for key, value in rows[0].items()), flush=True)
    for keep in [0.5] if args.tiny else args.keep:
        for setting in SETTINGS + (SEQUENTIAL if args.sequential or args.tiny else []):
            model, _ = encoder.load_encoder(args.device)
            fisher = setting["method"] == "fisher"
            report = sm.compress(
                model,
                keep,
                calibration=paired if fisher else batches,
                objective=contrastive_loss if fisher else encoder.embeddings_of,
                filter="encoder.*",
                **setting,
            )
            got = encoder.embed(model, tokenizer, queries + documents)
            cosine = encoder.cosine(got, reference)
            recall = encoder.retrieval(got[:held_out], got[held_out:])
            row = {
                "setting": ", ".join("sequential" if v is True else v for v in setting.values()),
                "keep": keep,
                "kept": round(report.kept, 4),
                "cosine": round(cosine.mean().item(), 4),
                "p5": round(cosine.quantile(0.05).item(), 4),
                "recall@1": recall[0],
                "recall@10": recall[1],
                "seconds": round(report.seconds, 1),
                "peak MB": round((report.peak_memory or 0) / 1e6),
            }
            rows.append(row)
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    write(args, "compress", rows)


if __name__ == "__main__":
    main()
