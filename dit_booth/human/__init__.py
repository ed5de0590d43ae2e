"""A human study of finished runs: from their videos to a table of what people prefer.

systems      runs -> systems to compare: their videos of the same prompts
design       which pairs each rater sees, on which side, in which order
key          the researcher's file: what each clip of the page is
page         the page that raters see (template, style and script are in page/)
planted      clips that are obviously worse: attention checks
serve        a small server that hands out the page and collects answers
answers      files of answers -> raters, counted exclusions
crossed      means with crossed random effects of rater and prompt
strengths    Bradley-Terry strengths with ties
agreement    Krippendorff's alpha, side bias, learning effect
predict      accuracy of metrics at predicting people
analyse      answers -> results; result_page, export write them
power        detectable preferences
simulate     raters with known preferences
"""
