"""A human study of finished runs: from their videos to a table of what people prefer.

systems, texts   runs -> systems to compare; what raters read
design           which pairs each rater sees, on which side, in which order
planted          clips that are obviously worse: attention checks
key              the researcher's file: what each clip and trial is
settings, page   the page that raters see (template, style and script are in page/)
serve            a small server that hands out the page and collects answers
answers          files of answers -> raters, and what is refused
exclude          raters -> those who count, and their observations
crossed          means with crossed random effects of rater and prompt
strengths        Bradley-Terry strengths with ties
agreement        Krippendorff's alpha, side bias, learning effect
predict          accuracy of metrics at predicting people
analyse          all of it -> results; result_page, export and plots write them
power            detectable preferences; power_page writes them
simulate         raters with known preferences
"""
