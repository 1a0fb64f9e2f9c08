"""The bytes of an expert: what "2bit" means, how a record is laid out, how one quantises."""
