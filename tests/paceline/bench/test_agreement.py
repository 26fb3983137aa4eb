from paceline.bench.agreement import TIE, compare

PROMPTS = [(1,), (2,)]
REFERENCE = [(5, 6, 7), (8, 9)]


def test_equal_texts_need_no_judge():
    agreement = compare(PROMPTS, REFERENCE, [REFERENCE, REFERENCE], None)
    assert (agreement.equal, str(agreement)) == (4, "equal")


def test_a_text_whose_tokens_all_tie_with_the_best_is_a_tie():
    agreement = compare(PROMPTS, REFERENCE, [[(5, 4, 4), (8, 9)]], lambda prompt, text: [0.0, TIE / 2, 0.0])
    assert str(agreement) == "equal, 1 of 2 by ties"


def test_a_difference_after_a_tie_is_still_found():
    agreement = compare(PROMPTS, REFERENCE, [[(5, 4, 3), (8, 9)]], lambda prompt, text: [0.0, TIE / 2, 0.25])
    assert str(agreement) == "1 of 2 differ: prompt 0, token 2, logits 0.25 apart"


def test_a_text_that_ends_early_is_different():
    agreement = compare(PROMPTS, REFERENCE, [[(5, 6, 7), (8,)]], lambda prompt, text: [0.0] * len(text))
    assert str(agreement) == "1 of 2 differ: prompt 1, token 1"


def test_without_a_judge_any_difference_counts():
    agreement = compare(PROMPTS, REFERENCE, [[(5, 6, 7), (8, 8)]], None)
    assert str(agreement) == "1 of 2 differ: prompt 1, token 1"


def test_the_judge_is_asked_once_for_the_same_text_in_several_repeats():
    asked = []

    def gaps(prompt, text):
        asked.append(text)
        return [0.0] * len(text)

    agreement = compare(PROMPTS, REFERENCE, [[(5, 4, 4), (8, 9)]] * 3, gaps)
    assert (agreement.ties, asked) == (3, [(5, 4, 4)])
