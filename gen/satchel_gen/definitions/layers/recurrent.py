"""torch.nn.RNN, LSTM and GRU: linear maps and activations, step by step."""

from satchel_gen.definitions import Composite

RNN, LSTM, GRU = (Composite(name, without=("mkldnn", "cudnn")) for name in ("RNN", "LSTM", "GRU"))
