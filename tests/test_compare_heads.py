"The final notebook runs from end to end in its quick profile: every head, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('compare_heads')
    assert 'synthetic-taxa:' in text and all(
        o in text for o in ('committee', 'hace on arcface', 'hxe', 'soft_labels', 'LogisticRegression')
    )
    assert not errors
