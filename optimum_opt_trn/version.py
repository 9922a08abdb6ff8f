__version__ = "0.1.0.dev0"

# What the neuron target needs, for errors of those who ask for it without optimum-neuron.
NEEDED_FOR_NEURON = (
    "optimum-neuron 0.4.5, which is not installed here. It is for Python 3.10 and 3.11, transformers 4.57 and optimum "
    "2.0: install optimum-opt-trn[neuronx] there, or use instance_type='cpu'"
)
