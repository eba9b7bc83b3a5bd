"The results page of dynamic confidence runs from end to end in its quick profile, on organisms drawn on the spot."


def test_quick_profile(quick_page):
    text, errors = quick_page('confidence', timeout=300)
    assert 'synthetic-taxa' in text and all(
        o in text
        for o in ('expected', 'worst branch', 'bits per mistake', 'recalibrated', 'estimated ratios', 'half resolution')
    )
    assert not errors
