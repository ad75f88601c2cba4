Documentation.addTranslations({
  locale: "ja",
  messages: {
    ", in ": "，",
    "Hide Search Matches": "検索語の強調を消す",
    "Preparing search...": "検索を準備している…",
    "Search": "検索",
    "Search Results": "検索結果",
    "Searching": "検索中",
    "Search finished, found one page matching the search query.": ["${resultCount}件のページが見つかった．"],
    "Your search did not match any documents. Please make sure that all words are spelled correctly and that you've selected enough categories.":
      "一致するページはない．語を短くするか，別の語で試されたい．",
  },
  plural_expr: "0",
});
