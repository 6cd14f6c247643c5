"""plan."""


def test_plan_counts_the_bank_and_the_model(run, object_of, bank):
    found = object_of("plan", bank, "--bits", 8)
    assert found["members"] == 3 and found["base_bytes"] is None
    assert found["bytes"] == sum(found[f"{name}_bytes"] for name in ("basis", "shared", "private", "head"))
    shown = run("plan", bank).stdout
    assert "shared directions" in shown and "as full adapters" in shown and "3 members of" in shown


def test_plan_counts_the_base_model(object_of, bank, tmp_path):
    from tiny_models import llama

    model = llama()
    model.save_pretrained(tmp_path / "base")
    found = object_of("plan", bank, "--model", tmp_path / "base")
    assert found["base_bytes"] == 4 * sum(p.numel() for p in model.parameters())


def test_plan_refuses_what_is_no_number_of_members(refused, bank):
    assert "members=-1 is no number of members; give 0 or more" in refused("plan", bank, "--members", -1)
