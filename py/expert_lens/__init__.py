"""See a mixture-of-experts model's routing live, bit-exact, while its inference engine runs at full speed."""
