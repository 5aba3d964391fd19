"""What must hold on a GPU, as one command: ``make cuda``. Needs this repository and its environment, no network."""
