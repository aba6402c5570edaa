"""The training loop. Read trainer.py first: `main`, then `Trainer.__init__`, then `Trainer.train`."""
