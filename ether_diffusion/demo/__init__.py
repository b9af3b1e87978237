"""The web page: generate with adapters, train one, look inside it and take it along.

`worker` owns the pipeline and knows nothing of the page; `page` and the tabs know nothing of models.
"""
