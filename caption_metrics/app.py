"""The widget of a Space: this folder is one as it is (README.md has its settings, requirements.txt its packages)."""

from pathlib import Path

import evaluate

if __name__ == "__main__":
    # By its file, so that the Space may have any name.
    module = evaluate.load(str(Path(__file__).with_name("caption_metrics.py")))
    evaluate.utils.launch_gradio_widget(module)
