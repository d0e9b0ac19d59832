"""One module per op: the public function with its checks, autograd, and the op's registration."""
