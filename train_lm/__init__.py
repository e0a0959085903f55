"""The pretraining program: `python -m train_lm --config RECIPE --run_dir DIR`."""
