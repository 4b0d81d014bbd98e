"""Files that other runtimes can run, each held against the model it was made from before it is handed over."""

from featherweight.export.verify import export as export
