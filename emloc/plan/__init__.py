"""Plan before you run: how much memory each stage will take, and what fits into a budget.

Nothing is measured and no weight is read. The very functions that will run are run on tensors that
have shapes and no data (torch's fake tensors), while every allocation is counted.

- `tracking`: counts what tensors take, of real tensors as well
- `subject`: a model of a config, or the emulator that a ratio makes of it, without weights
- `work`: a batch without data
- `jobs`: what calibrate, teach and heal are to do
- `loaded`, `streamed`: the peaks of train, heal and generate, and of calibrate, teach and correct
- `options`: ratios side by side; the largest ratio, batch and length that fit
- `table`, `command`: the same as text
"""
