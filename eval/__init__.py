"""The evaluation program: `python -m eval run --model DIR --suite embedded --output DIR`."""
