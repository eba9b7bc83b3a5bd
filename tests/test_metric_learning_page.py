"The page about metric learning runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('metric_learning')
    assert all(
        o in text for o in ('synthetic-taxa', 'frozen features', 'tree SupCon', 'own answer', 'drop', 'f1-score')
    )
    assert not errors
