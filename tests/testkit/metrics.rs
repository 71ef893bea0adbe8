/// What `/metrics` said at one moment.
#[derive(Debug, Clone)]
pub struct Metrics {
    samples: Vec<Sample>,
    text: String,
}

#[derive(Debug, Clone)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

impl Metrics {
    /// Reads the Prometheus text format.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        Self { samples: lines.map(sample).collect(), text: text.to_owned() }
    }

    /// The sum of all samples of `name` that have `labels`; zero when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name).filter(|sample| sample.has(labels)).map(|sample| sample.value).sum()
    }

    /// Like [`Metrics::sum`], in whole numbers.
    #[expect(clippy::cast_possible_truncation, reason = "counts of things in a test are small")]
    pub fn count(&self, name: &str, labels: &[(&str, &str)]) -> i64 {
        self.sum(name, labels).round() as i64
    }

    /// Whether there is a sample of `name` with `labels`.
    pub fn has(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.of(name).any(|sample| sample.has(labels))
    }

    /// All of it, as it came.
    pub fn text(&self) -> String {
        self.text.clone()
    }

    /// The names that a `# TYPE` line announces.
    pub fn names(&self) -> Vec<&str> {
        let types = self.text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        types.filter_map(|line| line.split(' ').next()).collect()
    }

    fn of(&self, name: &str) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |sample| sample.name == name)
    }
}

impl Sample {
    fn has(&self, labels: &[(&str, &str)]) -> bool {
        labels.iter().all(|(name, value)| self.labels.iter().any(|(n, v)| n == name && v == value))
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
    let value = value.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
    let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
    // No label value of the relay holds a comma or a quote: they come from closed sets.
    let labels = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
    let labels = labels.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned())).collect();
    Sample { name: name.to_owned(), labels, value }
}
