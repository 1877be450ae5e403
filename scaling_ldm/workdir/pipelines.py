"""stub"""

INDEX = "model_index.json"


def load(where, folder, elsewhere):
    raise NotImplementedError
