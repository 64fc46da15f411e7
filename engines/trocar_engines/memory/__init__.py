"""The diverse memory bank (DiveMem): a pool of rows, the slots of one object, who earns a slot."""
