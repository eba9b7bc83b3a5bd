"The page about unseen species runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('unseen')
    assert all(
        o in text for o in ('climb', 'blend', 'complement', 'told when to stop', 'synthetic-taxa', 'prototype', 'knn')
    )
    assert not errors
