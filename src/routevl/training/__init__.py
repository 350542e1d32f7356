"""Training and prediction of runs, and the optimiser step that pretraining shares with them."""
