"""One optimiser step: inputs on the device, forward and backward, gradients of all ranks, new weights."""
