"""What tests share: fakes to talk to, networks to stand in, and the stubs behind the real claude."""
