//! Abstract syntax tree of a template.

use std::sync::Arc;

/// A literal of the template.
#[derive(Debug, Clone)]
pub(crate) enum Literal {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArithmeticOperator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ComparisonOperator {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
    In,
    NotIn,
}

/// Bounds of `[start:stop:step]`.
#[derive(Debug)]
pub(crate) struct Slice {
    pub(crate) start: Option<Expression>,
    pub(crate) stop: Option<Expression>,
    pub(crate) step: Option<Expression>,
}

#[derive(Debug)]
pub(crate) enum Expression {
    Literal(Literal),
    Name(String),
    Attribute(Box<Expression>, String),
    Item(Box<Expression>, Box<Expression>),
    Slice(Box<Expression>, Box<Slice>),
    List(Vec<Expression>),
    Tuple(Vec<Expression>),
    Dict(Vec<(Expression, Expression)>),
    Negative(Box<Expression>),
    Positive(Box<Expression>),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
    Arithmetic(ArithmeticOperator, Box<Expression>, Box<Expression>),
    Concatenation(Vec<Expression>),
    Comparison(Box<Expression>, Vec<(ComparisonOperator, Expression)>),
    Conditional(Box<Conditional>),
    Call(Box<Expression>, Box<ArgumentList>),
    Filter(Box<Expression>, Box<Filter>),
    Test(Box<Expression>, Box<Filter>),
}

/// `then if test else otherwise`.
#[derive(Debug)]
pub(crate) struct Conditional {
    pub(crate) test: Expression,
    pub(crate) then: Expression,
    pub(crate) otherwise: Option<Expression>,
}

/// Argument expressions of a call.
#[derive(Debug, Default)]
pub(crate) struct ArgumentList {
    pub(crate) positional: Vec<Expression>,
    pub(crate) named: Vec<(String, Expression)>,
    /// `*expression`.
    pub(crate) more: Option<Expression>,
    /// `**expression`.
    pub(crate) more_named: Option<Expression>,
}

/// A filter or a test with its arguments, excluding the value that it is applied to.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) name: String,
    pub(crate) arguments: ArgumentList,
}

/// Left-hand side of an assignment.
#[derive(Debug)]
pub(crate) enum AssignTarget {
    Name(String),
    /// An attribute of a namespace.
    Attribute(String, String),
    Tuple(Vec<AssignTarget>),
}

/// A statement with its line number.
#[derive(Debug)]
pub(crate) struct Statement {
    pub(crate) line: usize,
    pub(crate) kind: StatementKind,
}

#[derive(Debug)]
pub(crate) enum StatementKind {
    Text(String),
    Print(Expression),
    For(Arc<For>),
    If(If),
    Set(AssignTarget, Expression),
    SetBlock {
        target: AssignTarget,
        filters: Vec<Filter>,
        body: Vec<Statement>,
    },
    With {
        variables: Vec<(AssignTarget, Expression)>,
        body: Vec<Statement>,
    },
    Macro(Arc<Macro>),
    CallBlock {
        callee: Expression,
        arguments: ArgumentList,
        caller: Arc<Macro>,
    },
    FilterBlock {
        filters: Vec<Filter>,
        body: Vec<Statement>,
    },
    /// The `generation` tag of transformers: a scope that prints its body.
    Generation(Vec<Statement>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(crate) struct If {
    /// Conditions and their bodies, in order.
    pub(crate) branches: Vec<(Expression, Vec<Statement>)>,
    pub(crate) otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(crate) struct For {
    pub(crate) target: AssignTarget,
    pub(crate) items: Expression,
    pub(crate) filter: Option<Expression>,
    pub(crate) is_recursive: bool,
    pub(crate) body: Vec<Statement>,
    pub(crate) otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(crate) struct Macro {
    pub(crate) name: String,
    /// Parameters; trailing ones may have defaults.
    pub(crate) parameters: Vec<(String, Option<Expression>)>,
    pub(crate) body: Vec<Statement>,
    /// The special variables that the body uses; a macro accepts only those.
    pub(crate) takes: Takes,
}

/// The special variables that a macro body uses.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Takes {
    pub(crate) caller: bool,
    pub(crate) kwargs: bool,
    pub(crate) varargs: bool,
}
