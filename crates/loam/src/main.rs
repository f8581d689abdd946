//! The `loam` command: arguments, output and exit codes. What the commands do is in the libraries.

mod arguments;
mod commands;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments = match arguments::Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(usage) => return output::report_usage(&usage),
    };
    match commands::dispatch(arguments) {
        Ok(code) => code,
        Err(error) => output::report(&error),
    }
}
