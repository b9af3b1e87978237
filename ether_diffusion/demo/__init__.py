"""The web page: generate with adapters, train one, look inside it and take it along.

`worker` owns the pipeline and its engine, and knows nothing of the page; `page` and the tabs know nothing of models.
"""

import os

# Gradio and the Hub's client read these when they are imported: nothing is reported to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
