"""Operations that autograd knows as one node, without a second derivative of its own."""
