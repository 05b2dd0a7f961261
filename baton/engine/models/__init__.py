"""Model families. One file a family; each turns a step plan into logits."""
