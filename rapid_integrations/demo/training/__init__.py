"""Training of the demo pair: data, network, initialisation, optimiser and schedule."""
